use super::*;

fn pool(name: &str) -> PoolId {
    name.parse().unwrap()
}

fn leads(share: usize, pools: &[(&str, Lead)]) -> Leads {
    Leads {
        in_force: true,
        dispatchers: 1,
        share,
        pools: pools
            .iter()
            .map(|(name, lead)| (pool(name), lead.clone()))
            .collect(),
    }
}

fn terms(of: &[(&str, u64)]) -> Terms {
    of.iter()
        .map(|(name, term)| (pool(name), Term(*term)))
        .collect()
}

#[test]
fn what_redis_says_is_taken_over_unless_it_was_given_up() {
    let other = |millis| Lead::Other {
        dispatcher: "d".parse().unwrap(),
        remaining: Duration::from_millis(millis),
    };
    let mine = |term| Lead::Mine(Term(term));
    let spent = terms(&[("old", 4), ("new", 4)]);
    let cases = [
        (leads(1, &[]), &[][..], &[][..], 0, None),
        (
            leads(2, &[("a", mine(7)), ("b", mine(8))]),
            &[("a", 7), ("b", 8)],
            &[],
            0,
            None,
        ),
        (
            leads(1, &[("a", mine(7)), ("b", mine(8))]),
            &[("a", 7), ("b", 8)],
            &[],
            1,
            None,
        ),
        // The term that lapsed here must not come back; a later one is as good as any.
        (
            leads(9, &[("old", mine(4)), ("new", mine(5))]),
            &[("new", 5)],
            &["old"],
            0,
            None,
        ),
        (
            leads(1, &[("a", other(900)), ("b", other(40))]),
            &[],
            &[],
            0,
            Some(40),
        ),
        (
            leads(1, &[("a", other(900)), ("b", Lead::Free)]),
            &[],
            &[],
            0,
            Some(250),
        ),
    ];
    for (answer, held, surrender, surplus, soonest) in cases {
        let expected = Verdict {
            terms: terms(held),
            surrender: surrender.iter().map(|name| pool(name)).collect(),
            surplus,
            soonest: soonest.map(Duration::from_millis),
        };
        assert_eq!(Verdict::of(&answer, &spent), expected, "{answer:?}");
    }
}

#[test]
fn the_fleets_duties_are_given_away_first() {
    let held = terms(&[("_fleet", 1), ("a", 2), ("b", 3)]);
    let fleet = pool(FLEET);
    let away = |count| {
        let pools = surplus(&held, &fleet, count);
        pools.iter().map(PoolId::to_string).collect::<Vec<_>>()
    };
    assert_eq!(away(0), [""; 0]);
    assert_eq!(away(2), ["_fleet", "b"]);
    assert_eq!(surplus(&terms(&[("a", 1)]), &fleet, 9), [pool("a")]);
}

#[tokio::test(start_paused = true)]
async fn a_term_is_relied_on_up_to_its_fence() {
    let (leadership, _orders) = Leadership::new(fresh_id("a host.with dots"));
    let name = pool("py");
    leadership.terms.send_replace(terms(&[("py", 3)]));
    assert_eq!(leadership.leads(&name), None, "nobody has said until when");
    leadership.rely_until(Instant::now() + Duration::from_secs(2));
    assert!(leadership.holds(&name, Term(3)) && !leadership.holds(&name, Term(2)));
    tokio::time::advance(Duration::from_secs(2)).await;
    assert_eq!(leadership.leads(&name), None);
    assert!(!leadership.leads_fleet());
}
