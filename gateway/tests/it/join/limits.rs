//! Goal: whoever joins or renews too often has to wait, and nobody else does.

use super::{
    Agent, Cluster, HOUR, SUBJECT, ask, ask_over, code, connect_from, join, key, register, request, token,
    vouched, world, world_with,
};
use crate::common::{PATIENCE, World, eventually, soon};
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use towline_proto::join::{Admitted, JoinRequest, Proof, RefusalCode, Token};

/// EN-03: an address that guesses is slowed down; the limit has its code, its metric and a time to wait.
#[tokio::test]
async fn guessing_is_refused_by_limit() {
    let world = Arc::new(world().await);
    register(&world, "east").await;
    let began = tokio::time::Instant::now();
    let (mut proofs, mut limits, mut tasks) = (0.0, 0, JoinSet::new());
    // As many as it takes: on a slow machine more of them are forgiven meanwhile.
    for n in 0.. {
        let world = Arc::clone(&world);
        let guess = Token { id: format!("guess-{n}"), secret: vec![1; 16].into() };
        tasks.spawn(async move { join(&world, &guess, &key()).await.unwrap_err() });
        // In waves, so that the handshakes per address are not the limit that is met.
        if n % 8 != 7 {
            continue;
        }
        while let Some(refused) = tasks.join_next().await {
            let refused = refused.unwrap();
            match code(&refused) {
                RefusalCode::Proof => proofs += 1.0,
                RefusalCode::Limit if refused.retry_after_ms > 0 => limits += 1,
                other => panic!("{other:?}"),
            }
        }
        // Those of a wave are judged before any of them has failed.
        let allowed = 20.0 + 8.0 + began.elapsed().as_secs_f64();
        assert!(proofs <= allowed, "{proofs} judged, {limits} not, in {:?}", began.elapsed());
        if limits >= 20 {
            break;
        }
        assert!(began.elapsed() < 4 * PATIENCE, "{proofs} judged, {limits} not");
    }
    assert!(world.series("towline_gateway_limits_reached_total{limit=\"join_failures\"}") >= 20.0);
}

/// An agent that renews endlessly gets a few certificates and then has to wait; its session stays.
#[tokio::test]
async fn renewing_is_limited() {
    let world = world().await;
    register(&world, "east").await;
    let token = token(&world, "east", 1, HOUR).await;
    let key = key();
    let admitted = join(&world, &token, &key).await.unwrap();
    let agent = Agent::connect(&world, &admitted, &key, 1).await.unwrap();
    let (mut renewed, began) = (0, tokio::time::Instant::now());
    let refused = loop {
        match agent.renew(&key).await {
            Ok(_) => renewed += 1,
            Err(refused) => break refused,
        }
        // One more every ten seconds.
        assert!(renewed <= 8 + began.elapsed().as_secs() / 10, "{renewed} in {:?}", began.elapsed());
    };
    assert!(renewed >= 8, "{renewed}");
    assert_eq!((code(&refused), refused.retry_after_ms), (RefusalCode::Limit, 10_000));
    assert_eq!(world.series("towline_gateway_limits_reached_total{limit=\"renewals\"}"), 1.0);
    assert!(agent.session.closed().is_none());
}

/// This number of processes that join concurrently by their ServiceAccount tokens.
fn crowd(
    world: &Arc<World>,
    cluster: &Cluster,
    boots: std::ops::Range<u8>,
) -> JoinSet<Result<Admitted, RefusalCode>> {
    let mut crowd = JoinSet::new();
    for boot in boots {
        let (world, proof) = (Arc::clone(world), cluster.token("1", SUBJECT));
        let request = JoinRequest { boot_id: vec![boot; 16].into(), ..request(proof, &key()) };
        crowd.spawn(async move { ask(&world, &request).await.map_err(|refused| code(&refused)) });
    }
    crowd
}

/// S9: a cluster that joins endlessly, and whose own session does not answer pings, uses up only its own share: agents of other clusters
/// can still join.
#[tokio::test]
async fn s9_joins_of_one_cluster_leave_the_others_alone() {
    let world = world_with(|config| config.limits.handshakes_per_address = 1024).await;
    let world = Arc::new(world);
    let (east, agent) = vouched(&world, 16).await;
    register(&world, "west").await;
    let west = token(&world, "west", 2, HOUR).await;
    agent.freeze().await;
    // Three times what all clusters together may do at once: two and a half seconds each, if they held places for it.
    let crowd = crowd(&world, &east, 2..200);
    let limited = || world.series("towline_gateway_limits_reached_total{limit=\"cluster_joins\"}");
    eventually("the cluster is told to wait", limited, |seen| *seen >= 100.0).await;
    for _ in 0..2 {
        soon("another cluster's agent joins", join(&world, &west, &key())).await.unwrap();
    }
    assert_eq!(world.series("towline_gateway_limits_reached_total{limit=\"joins\"}"), 0.0);
    let answers = crowd.join_all().await;
    // One is forgiven in each second.
    let judged = answers.iter().filter(|answer| !matches!(answer, Err(RefusalCode::Limit))).count();
    assert!((1..64).contains(&judged), "{judged} of {}", answers.len());
}

/// S9: no place is held while a sibling session is pinged: a dozen pods that rejoin concurrently next to a session that
/// does not answer are all admitted.
#[tokio::test]
async fn s9_a_place_is_given_back_while_a_sibling_is_asked() {
    let world = Arc::new(world().await);
    let (east, agent) = vouched(&world, 16).await;
    agent.freeze().await;
    let answers = crowd(&world, &east, 2..14).join_all().await;
    let refused: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().err()).collect();
    assert!(refused.is_empty(), "{refused:?}");
}

/// S9: joins count for their cluster whatever their outcome: denied ones, and repeated ones that succeed with a
/// token that the same key uses again.
#[tokio::test]
async fn s9_denied_and_repeated_joins_count_against_their_cluster() {
    let world = Arc::new(world().await);
    let (east, _agent) = vouched(&world, 1).await;
    let began = tokio::time::Instant::now();
    let answers = crowd(&world, &east, 2..82).join_all().await;
    let of =
        |wanted: RefusalCode| answers.iter().filter(|answer| answer.as_ref().err() == Some(&wanted)).count();
    let (denied, limited) = (of(RefusalCode::Denied), of(RefusalCode::Limit));
    let most = 32 + began.elapsed().as_secs() as usize;
    assert!((32..=most).contains(&denied), "{denied} of at most {most}");
    assert_eq!(denied + limited, answers.len(), "{answers:?}");

    register(&world, "west").await;
    let (token, key) = (token(&world, "west", 1, HOUR).await, key());
    let repeated = request(Proof::Token(token), &key);
    let (began, mut crowd) = (tokio::time::Instant::now(), JoinSet::new());
    for _ in 0..80 {
        let (world, request) = (Arc::clone(&world), repeated.clone());
        crowd.spawn(async move { ask(&world, &request).await.map_err(|refused| code(&refused)) });
    }
    let answers = crowd.join_all().await;
    let admitted = answers.iter().filter(|answer| answer.is_ok()).count();
    let most = 32 + began.elapsed().as_secs() as usize;
    assert!((32..=most).contains(&admitted), "{admitted} of at most {most}");
    let instances: HashSet<_> = answers.into_iter().flatten().map(|admitted| admitted.instance).collect();
    assert_eq!(instances.len(), 1, "one key is one agent");

    // The token may be in other hands: their address pays.
    let slowed = || world.series("towline_gateway_limits_reached_total{limit=\"join_failures\"}") > 0.0;
    let repeating = async {
        while !slowed() {
            let asks = (0..40).map(|_| {
                let (world, request) = (Arc::clone(&world), repeated.clone());
                async move { ask(&world, &request).await.map(drop).map_err(drop) }
            });
            let _ = asks.collect::<JoinSet<_>>().join_all().await;
        }
    };
    soon("the address is slowed", repeating).await;
}

/// S9: joins with a used-up or expired join token do not count for its cluster: the next valid join is served.
#[tokio::test]
async fn s9_invalid_tokens_do_not_count_for_their_cluster() {
    let world = Arc::new(world().await);
    register(&world, "east").await;
    let (spent, expired) =
        (token(&world, "east", 1, HOUR).await, token(&world, "east", 1, Duration::ZERO).await);
    let (mine, next) = (key(), token(&world, "east", 1, HOUR).await);
    let admitted = join(&world, &spent, &mine).await.unwrap();
    // From several addresses, none of which fails often enough to be slowed down: twice what the cluster may do at once.
    let mut crowd = JoinSet::new();
    for number in 0..64u8 {
        let (world, token) =
            (Arc::clone(&world), if number % 2 == 0 { spent.clone() } else { expired.clone() });
        crowd.spawn(async move {
            let io = connect_from(&world, [127, 0, 0, 10 + number / 16]).await;
            ask_over(io, &request(Proof::Token(token), &key()))
                .await
                .map(drop)
                .map_err(|refused| code(&refused))
        });
    }
    for refused in crowd.join_all().await {
        assert_eq!(refused, Err(RefusalCode::Proof));
    }
    assert_eq!(world.series("towline_gateway_limits_reached_total{limit=\"cluster_joins\"}"), 0.0);
    join(&world, &next, &key()).await.unwrap();
    let again = join(&world, &spent, &mine).await.unwrap();
    assert_eq!(again.instance, admitted.instance, "whose key has used it may come again");
}
