//! Both ends write as much as they can through pipes of every small capacity, and both finish: no capacity, batch size or
//! number of streams makes the two wait for each other.

use bytes::{Bytes, BytesMut};
use std::collections::{HashMap, VecDeque};
use towline_proto::mux::{Budget, Connection, Event, Introduction, Key, Limits, Read, Role};
use towline_proto::time::Instant;

const NOW: Instant = Instant::from_epoch(std::time::Duration::ZERO);

const SMALL: Shape = Shape { bulk: 2, echo: 2, bytes: 10_000, capacity: 1, batch: 65_536 };

/// One direction of a pipe that holds at most `capacity` bytes.
struct Pipe {
    bytes: VecDeque<u8>,
    capacity: usize,
}

/// One end's work with a stream.
struct Job {
    key: Key,
    /// Bytes still to write, and to read.
    write: usize,
    read: usize,
    /// Bytes read that wait to be written back, for the end that echoes.
    echo: Option<VecDeque<Bytes>>,
    finished: bool,
    ended: bool,
    written: u64,
    got: u64,
}

struct End {
    conn: Connection,
    out: VecDeque<Bytes>,
    jobs: Vec<Job>,
    by_key: HashMap<Key, usize>,
    /// Jobs that an event made ready. The others wait, so that a lost wake-up is a hang.
    ready: VecDeque<usize>,
}

#[derive(Clone, Copy)]
struct Shape {
    /// Streams that carry bulk in both directions, opened by each end; and that the other end echoes.
    bulk: usize,
    echo: usize,
    bytes: usize,
    capacity: usize,
    batch: usize,
}

fn end(role: Role) -> End {
    let limits = Limits {
        streams_max: 256,
        initial_credit: 4096,
        credit_max: 64 * 1024,
        recv_budget: 16 << 20,
        send_budget: 128 * 1024,
        ..Limits::default()
    };
    let conn = Connection::new(role, limits, Budget::new(16 << 20), Introduction::default(), NOW).unwrap();
    End { conn, out: VecDeque::new(), jobs: Vec::new(), by_key: HashMap::new(), ready: VecDeque::new() }
}

fn byte(key: Key, offset: u64) -> u8 {
    (offset.wrapping_mul(167) + u64::from(key.id.0)).to_le_bytes()[0]
}

impl End {
    /// Moves output into the pipe until it is full; returns whether anything moved.
    fn send(&mut self, pipe: &mut Pipe, batch: usize) -> bool {
        let mut moved = false;
        while pipe.bytes.len() < pipe.capacity {
            if self.out.is_empty() {
                if !self.conn.has_output() {
                    break;
                }
                moved |= self.conn.poll_output(NOW, batch, &mut self.out) > 0;
                continue;
            }
            let front = self.out.front_mut().unwrap();
            let n = front.len().min(pipe.capacity - pipe.bytes.len());
            pipe.bytes.extend(front.split_to(n));
            if front.is_empty() {
                self.out.pop_front();
            }
            moved = true;
        }
        moved
    }

    fn receive(&mut self, pipe: &mut Pipe) -> bool {
        if pipe.bytes.is_empty() {
            return false;
        }
        let bytes: BytesMut = pipe.bytes.drain(..).collect();
        self.conn.handle_input(NOW, bytes.freeze());
        true
    }

    fn events(&mut self, shape: Shape) {
        while let Some(event) = self.conn.poll_event() {
            match event {
                Event::Opened(key) => {
                    let echoes = (key.id.0 / 2) as usize % (shape.bulk + shape.echo) >= shape.bulk;
                    self.add(job(key, shape, echoes.then(VecDeque::new)));
                }
                Event::Readable(key) | Event::Writable(key) => self.ready.extend(self.by_key.get(&key)),
                Event::Closed(reason) => panic!("{reason}"),
                _ => {}
            }
        }
    }

    fn add(&mut self, job: Job) {
        self.by_key.insert(job.key, self.jobs.len());
        self.ready.push_back(self.jobs.len());
        self.jobs.push(job);
    }

    /// Lets the streams that may go on do what they can; tells whether any may.
    fn work(&mut self) -> bool {
        let moved = !self.ready.is_empty();
        while let Some(i) = self.ready.pop_front() {
            let job = &mut self.jobs[i];
            while job.echo_back(&mut self.conn) && job.read_some(&mut self.conn) {}
            job.write_some(&mut self.conn);
        }
        moved
    }

    fn is_done(&self) -> bool {
        self.jobs.iter().all(|job| job.finished && job.ended && job.read == 0)
    }
}

impl Job {
    /// Writes back what was read; tells whether nothing is left, for an echo reads no more than it can give back.
    fn echo_back(&mut self, conn: &mut Connection) -> bool {
        let Some(echo) = &mut self.echo else { return true };
        while let Some(bytes) = echo.front_mut() {
            if conn.write(NOW, self.key, bytes).unwrap() == 0 {
                return false;
            }
            if bytes.is_empty() {
                echo.pop_front();
            }
        }
        if self.ended && !self.finished {
            self.finished = true;
            conn.finish(NOW, self.key);
        }
        true
    }

    /// Reads once; returns whether there was anything.
    fn read_some(&mut self, conn: &mut Connection) -> bool {
        if self.ended {
            return false;
        }
        match conn.read(NOW, self.key, 3000) {
            Read::Data(bytes) => {
                assert!(bytes.iter().zip(self.got..).all(|(&b, at)| b == byte(self.key, at)));
                self.got += bytes.len() as u64;
                self.read -= bytes.len();
                if let Some(echo) = &mut self.echo {
                    echo.push_back(bytes);
                }
                true
            }
            Read::Finished => {
                self.ended = true;
                true
            }
            Read::Blocked => false,
            Read::Reset(code) => panic!("reset with {code}"),
        }
    }

    fn write_some(&mut self, conn: &mut Connection) {
        while self.write > 0 {
            let n = self.write.min(5000) as u64;
            let bytes: Vec<u8> = (self.written..self.written + n).map(|at| byte(self.key, at)).collect();
            let n = conn.write(NOW, self.key, &mut bytes.into()).unwrap();
            if n == 0 {
                return;
            }
            self.write -= n;
            self.written += n as u64;
        }
        if self.echo.is_none() && !self.finished {
            self.finished = true;
            conn.finish(NOW, self.key);
        }
    }
}

fn job(key: Key, shape: Shape, echo: Option<VecDeque<Bytes>>) -> Job {
    let write = if echo.is_some() { 0 } else { shape.bytes };
    Job { key, write, read: shape.bytes, echo, finished: false, ended: false, written: 0, got: 0 }
}

fn run(shape: Shape) {
    let mut ends = [end(Role::Gateway), end(Role::Agent)];
    let pipe = || Pipe { bytes: VecDeque::new(), capacity: shape.capacity };
    let mut pipes = [pipe(), pipe()];
    let mut opened = [0; 2];
    loop {
        let mut moved = false;
        for p in 0..2 {
            moved |= ends[p].send(&mut pipes[p], shape.batch);
            moved |= ends[p].receive(&mut pipes[1 - p]);
            ends[p].events(shape);
            while opened[p] < shape.bulk + shape.echo {
                let Ok(key) = ends[p].conn.open(NOW) else { break };
                // The acceptor tells from the id what the stream is for.
                assert_eq!(
                    (key.id.0 / 2) as usize % (shape.bulk + shape.echo),
                    (opened[p] + 1 - p) % (shape.bulk + shape.echo)
                );
                ends[p].add(job(key, shape, None));
                opened[p] += 1;
                moved = true;
            }
            moved |= ends[p].work();
        }
        if !moved {
            break;
        }
    }
    let Shape { capacity, batch, bulk, echo, bytes } = shape;
    let name =
        format!("capacity {capacity}, batch {batch}, {bulk} bulk and {echo} echo streams of {bytes} bytes");
    for end in &mut ends {
        assert_eq!(end.jobs.len(), 2 * (bulk + echo), "{name}: every stream was opened");
        assert!(end.is_done(), "{name}: both wait for each other");
        end.conn.check_invariants();
        for job in &end.jobs {
            end.conn.release(job.key);
        }
        assert_eq!(end.conn.streams(), 0, "{name}");
        end.conn.check_invariants();
    }
}

#[test]
fn every_small_capacity() {
    for capacity in 1..=64 {
        run(Shape { capacity, ..SMALL });
    }
}

#[test]
fn larger_capacities() {
    for capacity in [100, 127, 128, 1000, 4095, 4096, 16_383, 16_384, 16_385, 65_535, 65_536] {
        run(Shape { capacity, bytes: 100_000, ..SMALL });
    }
}

#[test]
fn every_small_batch() {
    for batch in (1..=64).chain([100, 1000, 2047, 2048, 2056, 4096, 16_384, 65_536]) {
        for capacity in [1, 13, 64, 1000, 65_536] {
            run(Shape { capacity, batch, bytes: 4200, ..SMALL });
        }
    }
}

#[test]
fn many_streams() {
    for (bulk, echo) in [(1, 0), (0, 1), (100, 100), (0, 200), (256, 0)] {
        for (capacity, bytes) in [(1, 500), (7, 2000), (64, 6000), (65_536, 30_000)] {
            run(Shape { bulk, echo, capacity, bytes, ..SMALL });
        }
    }
}
