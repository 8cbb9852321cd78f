//! Leadership: which dispatcher works for a pool, and in which term.

use std::collections::BTreeMap;
use std::time::Duration;

use broker_schema::{DispatcherId, PoolId, Term};

use crate::answer::{Answer, garbled};
use crate::error::{Fault, LeaseError};
use crate::store::{LeaseStore, millis};

/// What is free for longer is taken by a dispatcher that has its share already.
const PATIENCE: Duration = Duration::from_secs(1);

/// What a dispatcher asks for.
#[derive(Debug, Clone)]
pub struct LeadRequest<'a> {
    pub dispatcher: &'a DispatcherId,
    /// How long a term holds without being renewed.
    pub ttl: Duration,
    /// Whether to take what nobody leads. What is led is renewed either way.
    pub take: bool,
    pub pools: &'a [PoolId],
}

/// Who leads one pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Lead {
    /// Whoever asked.
    Mine(Term),
    Other {
        dispatcher: DispatcherId,
        remaining: Duration,
    },
    Free,
}

/// What a dispatcher is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leads {
    /// False where Redis is new or was flushed: nothing is given out before an incarnation is
    /// installed.
    pub in_force: bool,
    /// Dispatchers that are alive.
    pub dispatchers: u32,
    /// Most pools that each of them should lead.
    pub share: usize,
    pub pools: BTreeMap<PoolId, Lead>,
}

/// A pool's leader, as anybody may look it up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leader {
    pub pool: PoolId,
    pub dispatcher: DispatcherId,
    pub term: Term,
    pub remaining: Duration,
}

impl LeaseStore {
    /// Renews the terms of a dispatcher and takes new ones. An error leaves open whether Redis
    /// did as asked: what it gave out then is in the next answer.
    pub async fn lead(&self, request: &LeadRequest<'_>) -> Result<Leads, LeaseError> {
        let mut args = vec![
            request.dispatcher.to_string(),
            millis(request.ttl),
            u8::from(request.take).to_string(),
            millis(PATIENCE),
        ];
        args.extend(request.pools.iter().map(PoolId::to_string));
        let answer = self.run(&self.scripts().lead, &args).await;
        answer.and_then(leads).map_err(|source| LeaseError::Lead {
            dispatcher: request.dispatcher.clone(),
            source,
        })
    }

    /// Gives pools up, and with `leaving` the dispatcher's share of those to come.
    pub async fn step_down(
        &self,
        dispatcher: &DispatcherId,
        leaving: bool,
        pools: &[PoolId],
    ) -> Result<(), LeaseError> {
        let mut args = vec![dispatcher.to_string(), u8::from(leaving).to_string()];
        args.extend(pools.iter().map(PoolId::to_string));
        let answer = self.run(&self.scripts().step_down, &args).await;
        answer.map(drop).map_err(|source| LeaseError::Lead {
            dispatcher: dispatcher.clone(),
            source,
        })
    }

    /// Who leads these pools; those that nobody leads are left out.
    pub async fn leaders(&self, pools: &[PoolId]) -> Result<Vec<Leader>, LeaseError> {
        let args: Vec<String> = pools.iter().map(PoolId::to_string).collect();
        let answer = self.run(&self.scripts().leaders, &args).await;
        answer.and_then(leaders).map_err(LeaseError::Leaders)
    }
}

fn leads(mut answer: Answer) -> Result<Leads, Fault> {
    let in_force = match answer.tag()?.as_str() {
        "1" => true,
        "0" => false,
        "counter_spent" => return Err(Fault::CounterSpent),
        other => return Err(garbled("answer", other)),
    };
    let mut leads = Leads {
        in_force,
        dispatchers: answer.value("number of dispatchers")?,
        share: answer.value("share")?,
        pools: BTreeMap::new(),
    };
    while !answer.is_done() {
        let pool = answer.value("pool")?;
        let lead = match answer.tag()?.as_str() {
            "mine" => Lead::Mine(term(&mut answer)?),
            "other" => Lead::Other {
                dispatcher: answer.value("dispatcher")?,
                remaining: answer.millis("time left")?,
            },
            "free" => Lead::Free,
            other => return Err(garbled("leader", other)),
        };
        leads.pools.insert(pool, lead);
    }
    Ok(leads)
}

fn leaders(mut answer: Answer) -> Result<Vec<Leader>, Fault> {
    let mut leaders = Vec::new();
    while !answer.is_done() {
        leaders.push(Leader {
            pool: answer.value("pool")?,
            dispatcher: answer.value("dispatcher")?,
            term: term(&mut answer)?,
            remaining: answer.millis("time left")?,
        });
    }
    Ok(leaders)
}

fn term(answer: &mut Answer) -> Result<Term, Fault> {
    Ok(Term::new(
        answer.value("incarnation")?,
        answer.value("term")?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(texts: &[&str]) -> Result<Leads, Fault> {
        leads(Answer::new(texts.iter().map(|&t| t.to_owned()).collect()))
    }

    #[test]
    fn each_pool_has_its_leader() {
        let read = read(&[
            "1", "2", "2", "a", "mine", "3", "9", "b", "other", "d-2", "1500", "c", "free",
        ])
        .unwrap();
        let pools: Vec<(String, Lead)> = read
            .pools
            .into_iter()
            .map(|(pool, lead)| (pool.to_string(), lead))
            .collect();
        let other = Lead::Other {
            dispatcher: "d-2".parse().unwrap(),
            remaining: Duration::from_millis(1500),
        };
        let expected = [
            ("a".to_owned(), Lead::Mine(Term::new(3, 9))),
            ("b".to_owned(), other),
            ("c".to_owned(), Lead::Free),
        ];
        assert_eq!(pools, expected);
        assert_eq!((read.in_force, read.dispatchers, read.share), (true, 2, 2));
    }

    #[test]
    fn garbage_is_an_error() {
        for texts in [
            &[][..],
            &["yes", "1", "1"],
            &["1", "-1", "1"],
            &["1", "1", "1", "a"],
            &["1", "1", "1", "a b", "free"],
            &["1", "1", "1", "a", "mine", "3"],
            &["1", "1", "1", "a", "mine", "3", "4294967296"],
            &["1", "1", "1", "a", "other", "x y", "1"],
            &["1", "1", "1", "a", "who"],
        ] {
            assert!(read(texts).is_err(), "{texts:?}");
        }
        assert!(matches!(read(&["counter_spent"]), Err(Fault::CounterSpent)));
    }
}
