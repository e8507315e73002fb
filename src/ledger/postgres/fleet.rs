//! What the schema of a fleet says of it, for people: looked at, never changed.

use crate::hold::{Hold, HoldState};
use crate::id::BootId;
use crate::ledger::LedgerError;
use crate::ledger::postgres::session::{Own, SILENCE_S, STEPS};
use crate::ledger::postgres::writer::unavailable;
use crate::ledger::row::{self, BindingRow, META, PHASE_ENDED, PHASE_LIVE, meta};
use crate::postgres::{self, Connection, DatabaseError, Target};
use crate::time::UnixMs;

/// Live holds that are looked at.
const HOLDS_MAX: i64 = 50_000;
/// Runs that are looked at, the latest first.
const RUNS_MAX: i64 = 1_000;

/// The last run of a sidecar.
#[derive(Clone, Debug)]
pub struct Run {
    /// Its node.
    pub node: String,
    /// How long ago it last said that it lives, in seconds; `None` once that is forgotten.
    pub silent_s: Option<u64>,
    /// Whether others took it for gone.
    pub fenced: bool,
}

impl Run {
    /// Whether it lives, as far as others can see.
    pub fn lives(&self) -> bool {
        !self.fenced && self.silent_s.is_some_and(|silent| silent <= u64::from(SILENCE_S))
    }
}

/// How a fleet is.
#[derive(Clone, Debug)]
pub struct Fleet {
    /// The version of the schema; `None` where there is none yet.
    pub version: Option<i32>,
    /// The last version that this build knows.
    pub known: i32,
    /// To whom it is bound; `None` before the first start.
    pub binding: Option<BindingRow>,
    /// Its sidecars, each by its last run.
    pub runs: Vec<Run>,
    /// Holds in doubt.
    pub doubts: u64,
    /// Since when the oldest of them is.
    pub oldest_doubt: Option<UnixMs>,
    /// Holds that a run is sending which is gone: they become doubts.
    pub left_behind: u64,
    /// Whether there are more live holds than were looked at.
    pub has_more_holds: bool,
    /// Connections in use, and how many there may be; `None` where the server does not tell.
    pub connections: Option<(i64, i64)>,
}

/// Looks at the fleet that a schema belongs to.
///
/// # Errors
/// [`LedgerError`]: the database gives no answer, or not one that can be read.
pub async fn look(target: &Target) -> Result<Fleet, LedgerError> {
    look_by(&postgres::connect(target).await.map_err(unavailable)?).await
}

async fn look_by(session: &Connection) -> Result<Fleet, LedgerError> {
    let mut fleet = Fleet {
        version: version(session).await.map_err(unavailable)?,
        known: i32::try_from(STEPS.len()).unwrap_or(i32::MAX),
        binding: None,
        runs: Vec::new(),
        doubts: 0,
        oldest_doubt: None,
        left_behind: 0,
        has_more_holds: false,
        // Servers of the same wire protocol need not have that view.
        connections: connections(session).await.ok(),
    };
    // A newer one is not looked into, and an empty one has nothing.
    if fleet.version != Some(fleet.known) {
        return Ok(fleet);
    }
    let binding = Own([0; 16]).stored(usize::from(META.number), meta::BINDING.as_bytes());
    let binding = session.query_opt("SELECT v FROM meta WHERE k = $1", &[&binding]).await.map_err(failed)?;
    if let Some(found) = binding {
        fleet.binding = Some(row::decode(found.try_get(0).map_err(failed)?)?);
    }
    let living = runs(session, &mut fleet).await.map_err(unavailable)?;
    holds(session, &mut fleet, &living).await?;
    Ok(fleet)
}

fn failed(error: tokio_postgres::Error) -> LedgerError {
    unavailable(error.into())
}

async fn version(session: &Connection) -> Result<Option<i32>, DatabaseError> {
    let made = "SELECT EXISTS (SELECT 1 FROM information_schema.tables
                WHERE table_schema = current_schema() AND table_name = 'migrations')";
    if !session.query_one(made, &[]).await?.try_get::<_, bool>(0)? {
        return Ok(None);
    }
    let found = session.query_opt("SELECT version FROM migrations WHERE id = 1", &[]).await?;
    Ok(found.map(|row| row.try_get(0)).transpose()?.filter(|version| *version > 0))
}

async fn connections(session: &Connection) -> Result<(i64, i64), DatabaseError> {
    let asked = "SELECT (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'),
                 current_setting('max_connections')::bigint";
    let row = session.query_one(asked, &[]).await?;
    Ok((row.try_get(0)?, row.try_get(1)?))
}

/// Answers the runs that are not fenced.
async fn runs(session: &Connection, fleet: &mut Fleet) -> Result<Vec<BootId>, DatabaseError> {
    let last = "SELECT s.node, coalesce(b.fenced, true),
                    extract(epoch FROM clock_timestamp() - b.seen)::bigint
                FROM sidecars s LEFT JOIN boots b ON b.boot = s.boot ORDER BY b.seen DESC NULLS LAST LIMIT $1";
    for row in session.query(last, &[&RUNS_MAX]).await? {
        let silent: Option<i64> = row.try_get(2)?;
        let silent_s = silent.map(|silent| u64::try_from(silent).unwrap_or(0));
        fleet.runs.push(Run { node: row.try_get(0)?, fenced: row.try_get(1)?, silent_s });
    }
    let mut living = Vec::new();
    let not_fenced = "SELECT boot FROM boots WHERE NOT fenced
                      AND seen >= clock_timestamp() - make_interval(secs => $1)";
    for row in session.query(not_fenced, &[&f64::from(SILENCE_S)]).await? {
        let boot: &[u8] = row.try_get(0)?;
        living.extend(boot.try_into().ok().map(BootId::from_bytes));
    }
    Ok(living)
}

async fn holds(session: &Connection, fleet: &mut Fleet, living: &[BootId]) -> Result<(), LedgerError> {
    let (from, to) = (vec![PHASE_LIVE], vec![PHASE_ENDED]);
    let live = "SELECT v FROM holds WHERE k >= $1 AND k < $2 ORDER BY k LIMIT $3";
    let rows = session.query(live, &[&from, &to, &HOLDS_MAX]).await.map_err(failed)?;
    fleet.has_more_holds = i64::try_from(rows.len()).is_ok_and(|rows| rows == HOLDS_MAX);
    for row in rows {
        let hold: Hold = row::decode(row.try_get(0).map_err(failed)?)?;
        match hold.state {
            HoldState::Doubt => {
                fleet.doubts += 1;
                fleet.oldest_doubt =
                    Some(fleet.oldest_doubt.map_or(hold.since, |oldest| oldest.min(hold.since)));
            }
            HoldState::Sending { boot } if !living.contains(&boot) => fleet.left_behind += 1,
            HoldState::Sending { .. } | HoldState::Open | HoldState::Spent | HoldState::Void => {}
        }
    }
    Ok(())
}
