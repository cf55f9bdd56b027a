#![no_main]

#[path = "../../tests/it/fuzz_bodies.rs"]
mod bodies;

use arbitrary::{Arbitrary, Result, Unstructured};
use bodies::{KINDS, Op};

#[derive(Debug)]
struct Ops(Vec<(bool, Op)>);

impl<'a> Arbitrary<'a> for Ops {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let mut ops = Vec::new();
        while !input.is_empty() && ops.len() < 1000 {
            let peer = input.arbitrary()?;
            let kind = input.choose_index(KINDS)?;
            ops.push((peer, Op::draw(kind, |bound| input.int_in_range(0..=bound - 1).unwrap_or(0))));
        }
        Ok(Self(ops))
    }
}

libfuzzer_sys::fuzz_target!(|ops: Ops| bodies::ops(&ops.0));
