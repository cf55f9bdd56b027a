//! Goal: of many keys that use a join token for one at the same moment exactly one gets in, over the wire, also if the gateway is
//! killed in the middle of it. EN-01, EN-09, R-ID-14, SG16.
//!
//! `TOWLINE_RACE=1000` is how many keys there are.

use crate::common::fleet::Fleet;
use crate::common::joining::join;
use crate::common::within;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::{Barrier, Semaphore};
use tokio::task::JoinSet;
use tokio::time::sleep;
use towline_certs::{AgentKey, JoinToken};
use towline_proto::join::{Admitted, RefusalCode};

/// Keys that ask at the same moment; as many joins as may be under way and twice as many that wait.
const AT_ONCE: usize = 192;

/// A gateway with high limits per address, because all keys come from one address.
async fn gateway() -> Fleet {
    let listen = json!({
        "trustedProxies": ["127.0.0.0/8"], "proxyProtocol": "off", "quic": {"enabled": false},
    });
    Fleet::start(json!({"listen": listen})).await
}

/// Asks with one key until it is told whether it is in; counts how often it had to ask again.
async fn settle(
    fleet_at: std::net::SocketAddr,
    token: &JoinToken,
    key: &AgentKey,
    again: &AtomicUsize,
) -> Option<Admitted> {
    let began = Instant::now();
    loop {
        assert!(began.elapsed() < Duration::from_secs(240), "a key never learns what became of it");
        match join(fleet_at, token, key).await {
            Ok(Ok(admitted)) => return Some(admitted),
            Ok(Err(refused)) => match RefusalCode::try_from(refused.code).unwrap() {
                RefusalCode::Proof => {
                    assert!(refused.text.contains("already used"), "{}", refused.text);
                    return None;
                }
                RefusalCode::Limit | RefusalCode::Unavailable => {
                    assert!(refused.retry_after_ms > 0, "{}", refused.text);
                    sleep(Duration::from_millis(refused.retry_after_ms.into())).await;
                }
                other => panic!("{other:?}: {}", refused.text),
            },
            // No room for the handshake, or no gateway.
            Err(_) => sleep(Duration::from_millis(50)).await,
        }
        again.fetch_add(1, Ordering::Relaxed);
    }
}

/// Lets many keys use a token; returns the admitted ones, and how often each had to retry.
async fn race(
    fleet: &mut Fleet,
    token: &JoinToken,
    keys: usize,
    killed_after: Option<Duration>,
) -> (Vec<(Admitted, AgentKey)>, usize) {
    let (token, again) = (Arc::new(token.clone()), Arc::new(AtomicUsize::new(0)));
    let (room, start) = (Arc::new(Semaphore::new(AT_ONCE)), Arc::new(Barrier::new(keys.min(AT_ONCE) + 1)));
    let mut tasks = JoinSet::new();
    for number in 0..keys {
        let (at, token, again) = (fleet.front, Arc::clone(&token), Arc::clone(&again));
        let (room, start) = (Arc::clone(&room), Arc::clone(&start));
        tasks.spawn(async move {
            let key = AgentKey::generate().unwrap();
            if number < AT_ONCE {
                start.wait().await;
            }
            let _permit = room.acquire().await.unwrap();
            settle(at, &token, &key, &again).await.map(|admitted| (admitted, key))
        });
    }
    start.wait().await;
    if let Some(after) = killed_after {
        sleep(after).await;
        fleet.kill().await;
        fleet.begin();
        fleet.ready().await;
    }
    let winners = within("every key's answer", Duration::from_secs(300), tasks.join_all()).await;
    (winners.into_iter().flatten().collect(), again.load(Ordering::Relaxed))
}

/// The instances that a token has let in, as the store says.
async fn instances_of(fleet: &Fleet, token: &JoinToken) -> Vec<String> {
    let dump: Value = serde_json::from_str(&fleet.command(&["store", "dump"]).await.unwrap()).unwrap();
    let records = dump["records"].as_array().unwrap().iter();
    let ours = records.filter(|record| record["data"]["origin"]["token"]["token"] == *token.id);
    ours.map(|record| record["name"].as_str().unwrap().to_owned()).collect()
}

/// Goal: with many keys for a single use, one is admitted, all others are told that the token was used, and no other is recorded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: hundreds of joins at once"]
async fn of_many_keys_one_gets_in() {
    let keys = std::env::var("TOWLINE_RACE").map_or(200, |text| text.parse().unwrap());
    let mut fleet = gateway().await;
    fleet.register("prod").await;
    let token = fleet.token("prod", 1).await;
    let started = Instant::now();
    let (winners, again) = race(&mut fleet, &token, keys, None).await;
    eprintln!(
        "{keys} keys, {} in, {again} asked again, {:.1} s",
        winners.len(),
        started.elapsed().as_secs_f32()
    );
    let [(admitted, key)] = &winners[..] else { panic!("{} of {keys} keys got in", winners.len()) };
    let back = join(fleet.front, &token, key).await.unwrap().unwrap();
    assert_eq!(back.instance, admitted.instance, "who got in may ask again");
    fleet.kill().await;
    assert_eq!(instances_of(&fleet, &token).await, [&*admitted.instance]);
}

/// Goal: the same with a gateway that is killed during the race: keys without an answer retry, and one is admitted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "slow: six races, each across a crash"]
async fn of_many_keys_one_gets_in_across_a_crash() {
    let mut fleet = gateway().await;
    fleet.register("prod").await;
    let mut all = Vec::new();
    for round in 0..6 {
        let token = fleet.token("prod", 1).await;
        let (winners, _) = race(&mut fleet, &token, 24, Some(Duration::from_millis(10 + 25 * round))).await;
        assert_eq!(winners.len(), 1, "round {round}");
        all.push((token, winners[0].0.instance.clone()));
    }
    fleet.kill().await;
    for (token, instance) in all {
        assert_eq!(instances_of(&fleet, &token).await, [instance]);
    }
}
