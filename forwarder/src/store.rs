//! Where rules are kept: one SQLite file, one transaction per change.
//!
//! What the controller manages has columns of its own; what the user asked for is one JSON text.
//! Every commit is on the disk before it returns (WAL with `synchronous = FULL`), so an
//! acknowledged change survives a power cut.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use jiff::Timestamp;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::datapath::Epoch;
use crate::rule::{Rule, RuleId};

const FILE: &str = "rules.sqlite";
const LOCK: &str = "lock";

/// Marks the file as ours: "fwdr".
const APPLICATION: i32 = 0x6677_6472;
const VERSION: i32 = 1;

const SCHEMA: &str = "
    CREATE TABLE meta (
        only INTEGER PRIMARY KEY CHECK (only = 1),
        store_id INTEGER NOT NULL,
        next_epoch INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE rules (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        slot INTEGER NOT NULL UNIQUE,
        epoch_tcp INTEGER NOT NULL,
        epoch_udp INTEGER NOT NULL,
        spec TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        created_by TEXT NOT NULL,
        changed_at INTEGER NOT NULL,
        expires_at INTEGER,
        draining INTEGER NOT NULL,
        bound TEXT NOT NULL
    ) STRICT;";

/// Epochs are reserved in blocks, so that most changes cost one write, not two.
const EPOCH_BLOCK: u32 = 64;

/// Held by the one controller that may work on a state directory, until it is dropped.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Makes the directory where needed and takes the lock, or names the controller that has it.
    pub fn take(state_dir: &Path) -> Result<Self> {
        // Whoever can open the lock's file can hold the lock: that is for the owner alone.
        DirBuilder::new().recursive(true).mode(0o700).create(state_dir).with_context(|| {
            format!("cannot make the state directory {} (--state-dir names another)", state_dir.display())
        })?;
        let path = state_dir.join(LOCK);
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .with_context(|| format!("cannot open {} (--state-dir names another place)", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => {
                let mut holder = String::new();
                // The holder's number is a help to the reader; without it the refusal stands.
                let _ = file.read_to_string(&mut holder);
                bail!(
                    "another controller (pid {}) works on {}: stop it, or give this one another --state-dir",
                    holder.trim(),
                    state_dir.display()
                );
            }
            Err(fs::TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        file.set_len(0)?;
        file.rewind()?;
        writeln!(file, "{}", std::process::id())?;
        Ok(StateLock { _file: file })
    }
}

/// The rules' store, open.
pub struct Store {
    connection: Connection,
    id: u64,
    next_epoch: u32,
    reserved_epoch: u32,
}

impl Store {
    /// Opens the store of `state_dir`, or makes an empty one. Never repairs or removes what it cannot read.
    pub fn open(state_dir: &Path) -> Result<Self> {
        let path = path(state_dir);
        let connection = Connection::open(&path).and_then(|connection| {
            // The first statement reads the file, so damage shows here.
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "FULL")?;
            Ok(connection)
        });
        let mut connection = connection.map_err(|error| unreadable(&path, &error))?;
        prepare(&mut connection, &path)?;
        let (id, next_epoch) = connection
            .query_row("SELECT store_id, next_epoch FROM meta", [], |row| {
                Ok((row.get::<_, i64>(0)?, row.get::<_, u32>(1)?))
            })
            .map_err(|error| unreadable(&path, &error))?;
        Ok(Store { connection, id: id.cast_unsigned(), next_epoch, reserved_epoch: next_epoch })
    }

    /// A random number that tells this store's pinned maps from another's.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// A number that no flow was ever made under.
    ///
    /// It is reserved outside of any change: were it taken back with a change that failed,
    /// flows that the kernel has made under it meanwhile would belong to a later rule.
    pub fn next_epoch(&mut self) -> Result<u32> {
        if self.next_epoch == self.reserved_epoch {
            let reserved =
                self.reserved_epoch.checked_add(EPOCH_BLOCK).context("the store is out of epochs")?;
            self.connection.execute("UPDATE meta SET next_epoch = ?1", [reserved])?;
            self.reserved_epoch = reserved;
        }
        let epoch = self.next_epoch;
        self.next_epoch += 1;
        Ok(epoch)
    }

    /// The id that the next new rule gets; ids of deleted rules do not come back.
    pub fn next_rule_id(&self) -> Result<RuleId> {
        let last: Option<i64> = self
            .connection
            .query_row("SELECT seq FROM sqlite_sequence WHERE name = 'rules'", [], |row| row.get(0))
            .optional()?;
        Ok(last.unwrap_or(0).cast_unsigned() + 1)
    }

    pub fn rules(&self) -> Result<Vec<Rule>> {
        let mut statement = self.connection.prepare(
            "SELECT id, slot, epoch_tcp, epoch_udp, spec, created_at, created_by, changed_at, expires_at, draining, \
             bound FROM rules ORDER BY id",
        )?;
        let mut rows = statement.query([])?;
        let mut rules = Vec::new();
        while let Some(row) = rows.next()? {
            rules.push(rule(row).with_context(|| {
                let id = row.get::<_, i64>(0).unwrap_or(0);
                format!(
                    "rule {id} of the store cannot be read: restore {FILE} from a backup, or move it away"
                )
            })?);
        }
        Ok(rules)
    }

    /// Removes what has expired by `now` and gives it back.
    pub fn remove_expired(&mut self, now: Timestamp) -> Result<Vec<Rule>> {
        let mut expired = self.rules()?;
        expired.retain(|rule| rule.expires_at.is_some_and(|end| end <= now));
        let change = self.begin()?;
        for rule in &expired {
            change.remove(rule.id)?;
        }
        change.commit()?;
        Ok(expired)
    }

    /// Begins a change; without `commit` nothing of it remains.
    pub fn begin(&mut self) -> Result<Change<'_>> {
        Ok(Change { transaction: self.connection.transaction()? })
    }
}

/// An open transaction.
pub struct Change<'a> {
    transaction: rusqlite::Transaction<'a>,
}

impl Change<'_> {
    /// Writes a rule, whether or not the store has it already.
    pub fn put(&self, rule: &Rule) -> Result<()> {
        self.transaction.prepare_cached(
            "INSERT INTO rules (id, slot, epoch_tcp, epoch_udp, spec, created_at, created_by, changed_at, expires_at, \
             draining, bound) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11) ON CONFLICT (id) DO UPDATE SET \
             slot = ?2, epoch_tcp = ?3, epoch_udp = ?4, spec = ?5, created_at = ?6, created_by = ?7, changed_at = ?8, \
             expires_at = ?9, draining = ?10, bound = ?11",
        )?
        .execute(params![
            rule.id.cast_signed(),
            rule.slot,
            rule.epoch.tcp,
            rule.epoch.udp,
            serde_json::to_string(&rule.spec)?,
            rule.created_at.as_millisecond(),
            rule.created_by,
            rule.changed_at.as_millisecond(),
            rule.expires_at.map(Timestamp::as_millisecond),
            rule.draining,
            serde_json::to_string(&rule.bound)?,
        ])?;
        Ok(())
    }

    pub fn remove(&self, id: RuleId) -> Result<()> {
        self.transaction.prepare_cached("DELETE FROM rules WHERE id = ?1")?.execute([id.cast_signed()])?;
        Ok(())
    }

    /// Returns when the change is on the disk.
    pub fn commit(self) -> Result<()> {
        self.transaction.commit().context("cannot write the store")
    }
}

/// Makes the tables of an empty file; refuses a file that is damaged, foreign or from a newer version.
fn prepare(connection: &mut Connection, path: &Path) -> Result<()> {
    let read = |pragma: &str| {
        connection
            .pragma_query_value(None, pragma, |row| row.get::<_, i32>(0))
            .map_err(|error| unreadable(path, &error))
    };
    let (application, version) = (read("application_id")?, read("user_version")?);
    let check: String = connection
        .pragma_query_value(None, "quick_check", |row| row.get(0))
        .map_err(|error| unreadable(path, &error))?;
    if check != "ok" {
        return Err(unreadable(path, &check.lines().next().unwrap_or("damaged")));
    }
    let tables: u32 = connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
    match (application, version) {
        (0, 0) if tables == 0 => {
            create(connection).with_context(|| format!("cannot make {}", path.display()))
        }
        (APPLICATION, VERSION) => Ok(()),
        (APPLICATION, newer) if newer > VERSION => bail!(
            "the store {} has version {newer} and this controller knows {VERSION}: run a newer forwarderd, or give \
             another --state-dir",
            path.display()
        ),
        _ => bail!(
            "{} is a database, but no store of this controller: give another --state-dir, or move the file away",
            path.display()
        ),
    }
}

fn create(connection: &mut Connection) -> Result<()> {
    let transaction = connection.transaction()?;
    transaction.execute_batch(SCHEMA)?;
    // SQLite's own generator is seeded from the system's; 0 stays free for "no store".
    transaction.execute("INSERT INTO meta VALUES (1, max(1, abs(random() >> 1)), 1)", [])?;
    transaction.pragma_update(None, "application_id", APPLICATION)?;
    transaction.pragma_update(None, "user_version", VERSION)?;
    Ok(transaction.commit()?)
}

fn unreadable(path: &Path, reason: &dyn std::fmt::Display) -> anyhow::Error {
    anyhow!(
        "the store {} cannot be read ({reason}): restore it from a backup, or move it away to begin without rules",
        path.display()
    )
}

fn rule(row: &Row<'_>) -> Result<Rule> {
    Ok(Rule {
        id: row.get::<_, i64>(0)?.cast_unsigned(),
        slot: row.get(1)?,
        epoch: Epoch { tcp: row.get(2)?, udp: row.get(3)? },
        spec: serde_json::from_str(&row.get::<_, String>(4)?)?,
        created_at: Timestamp::from_millisecond(row.get(5)?)?,
        created_by: row.get(6)?,
        changed_at: Timestamp::from_millisecond(row.get(7)?)?,
        expires_at: row.get::<_, Option<i64>>(8)?.map(Timestamp::from_millisecond).transpose()?,
        draining: row.get(9)?,
        bound: serde_json::from_str::<Vec<IpAddr>>(&row.get::<_, String>(10)?)?,
    })
}

/// Where the store of `state_dir` lies.
fn path(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rule::Request;

    fn rule(id: RuleId, slot: u32) -> Rule {
        let request = Request {
            name: Some(format!("rule-{id}")),
            protocol: Some("tcp".parse().unwrap()),
            external: Some("wan:8080".parse().unwrap()),
            target: Some("10.0.0.10:80".parse().unwrap()),
            ..Request::default()
        };
        let now = crate::rule::now();
        Rule {
            id,
            slot,
            epoch: Epoch { tcp: 1, udp: 2 },
            spec: request.new_spec().unwrap(),
            created_at: now,
            created_by: "alice".into(),
            changed_at: now,
            expires_at: Some(now),
            draining: false,
            bound: vec!["203.0.113.10".parse().unwrap()],
        }
    }

    fn put(store: &mut Store, rule: &Rule) {
        let change = store.begin().unwrap();
        change.put(rule).unwrap();
        change.commit().unwrap();
    }

    fn refusal(state_dir: &Path) -> String {
        let error = format!("{:#}", Store::open(state_dir).err().expect("the store must be refused"));
        assert!(!error.contains('\n'), "{error}");
        error
    }

    #[test]
    fn a_committed_rule_is_there_after_reopening() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path()).unwrap();
        let id = store.id();
        put(&mut store, &rule(1, 0));
        let wanted = Rule { draining: true, expires_at: None, ..rule(1, 0) };
        put(&mut store, &wanted);
        drop(store);
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(store.rules().unwrap(), [wanted]);
        assert_eq!(store.id(), id);
        assert_ne!(id, 0);
    }

    #[test]
    fn an_uncommitted_change_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path()).unwrap();
        store.begin().unwrap().put(&rule(1, 0)).unwrap();
        assert!(store.rules().unwrap().is_empty());
    }

    #[test]
    fn ids_do_not_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path()).unwrap();
        assert_eq!(store.next_rule_id().unwrap(), 1);
        put(&mut store, &rule(7, 0));
        let change = store.begin().unwrap();
        change.remove(7).unwrap();
        change.commit().unwrap();
        assert_eq!(store.next_rule_id().unwrap(), 8);
    }

    #[test]
    fn epochs_only_grow_also_over_restarts_and_failed_changes() {
        let directory = tempfile::tempdir().unwrap();
        let mut last = 0;
        for _ in 0..3 {
            let mut store = Store::open(directory.path()).unwrap();
            for _ in 0..EPOCH_BLOCK + 3 {
                let epoch = store.next_epoch().unwrap();
                assert!(epoch > last);
                last = epoch;
            }
            drop(store.begin().unwrap());
        }
    }

    #[test]
    fn only_the_expired_are_removed() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path()).unwrap();
        let now = crate::rule::now();
        put(&mut store, &Rule { expires_at: Some(now), ..rule(1, 0) });
        put(&mut store, &Rule { expires_at: None, ..rule(2, 1) });
        put(&mut store, &Rule { expires_at: Some(now + std::time::Duration::from_secs(1)), ..rule(3, 2) });
        assert_eq!(store.remove_expired(now).unwrap().iter().map(|rule| rule.id).collect::<Vec<_>>(), [1]);
        assert_eq!(store.rules().unwrap().len(), 2);
    }

    #[test]
    fn a_file_that_is_no_store_is_refused_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let noise = "no database, ".repeat(1000);
        fs::write(path(directory.path()), &noise).unwrap();
        assert!(refusal(directory.path()).contains("move it away"));
        assert_eq!(fs::read_to_string(path(directory.path())).unwrap(), noise);
    }

    #[test]
    fn a_damaged_store_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path()).unwrap();
        for id in 1..200 {
            put(&mut store, &rule(id, id as u32));
        }
        drop(store);
        let mut bytes = fs::read(path(directory.path())).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..middle + 6000].fill(0xa5);
        fs::write(path(directory.path()), &bytes).unwrap();
        assert!(refusal(directory.path()).contains("restore it from a backup"));
    }

    #[test]
    fn a_newer_store_and_a_foreign_database_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        store.connection.pragma_update(None, "user_version", VERSION + 1).unwrap();
        drop(store);
        assert!(refusal(directory.path()).contains("newer forwarderd"));

        let directory = tempfile::tempdir().unwrap();
        Connection::open(path(directory.path()))
            .unwrap()
            .execute_batch("CREATE TABLE foreign_thing (x)")
            .unwrap();
        assert!(refusal(directory.path()).contains("no store of this controller"));
    }

    #[test]
    fn an_unreadable_rule_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let mut store = Store::open(directory.path()).unwrap();
        put(&mut store, &rule(1, 0));
        store.connection.execute("UPDATE rules SET spec = '{}'", []).unwrap();
        let error = format!("{:#}", store.rules().unwrap_err());
        assert!(error.contains("rule 1") && !error.contains('\n'), "{error}");
    }

    #[test]
    fn a_second_controller_is_refused_with_the_pid_of_the_first() {
        let directory = tempfile::tempdir().unwrap();
        let first = StateLock::take(directory.path()).unwrap();
        let error = StateLock::take(directory.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(first);
        StateLock::take(directory.path()).unwrap();
    }
}
