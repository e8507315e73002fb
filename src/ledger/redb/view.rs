//! What a reader sees: a snapshot of the tree, and before it the changes that are durable and not in the tree yet.

use std::cmp::Ordering;
use std::iter::Peekable;
use std::ops::Bound;
use std::sync::Arc;
use std::vec::IntoIter;

use redb::{AccessGuard, Database, Key, Range, ReadTransaction, ReadableDatabase, StorageError, Value};

use crate::ledger::LedgerError;
use crate::ledger::changes::{Change, Changes};
use crate::ledger::row::{Span, Table, Tables};
use crate::ledger::source::Order;

/// A snapshot of the tree with its tables open.
pub(crate) struct Tree {
    pub(crate) txn: ReadTransaction,
    tables: Tables,
}

impl Tree {
    pub(crate) fn open(db: &Database) -> Result<Arc<Self>, LedgerError> {
        let txn = db.begin_read()?;
        Ok(Arc::new(Self { tables: Tables::open(&txn)?, txn }))
    }
}

impl std::fmt::Debug for Tree {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tree").finish_non_exhaustive()
    }
}

/// All that is durable.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) tree: Arc<Tree>,
    /// What is on its way into the tree.
    pub(crate) settling: Arc<Changes>,
    /// What came after.
    pub(crate) recent: Changes,
}

impl View {
    pub(crate) fn of(tree: Arc<Tree>) -> Self {
        Self { tree, settling: Arc::default(), recent: Changes::default() }
    }

    /// Whether there are changes of a table that the tree does not have.
    pub(crate) fn changed<K: Key, V: Value>(&self, table: &Table<K, V>) -> bool {
        [&self.recent, &self.settling].iter().any(|changes| changes.of(table).next().is_some())
    }

    /// What a row is, by `read`.
    pub(crate) fn get<K: Key, V: Value, T>(
        &self,
        table: &Table<K, V>,
        key: &K::SelfType<'_>,
        read: impl FnOnce(V::SelfType<'_>) -> Result<T, LedgerError>,
    ) -> Result<Option<T>, LedgerError> {
        let bytes = K::as_bytes(key);
        for changes in [&self.recent, &self.settling] {
            match changes.get(table, bytes.as_ref()) {
                Change::None => {}
                Change::Removed => return Ok(None),
                Change::Put(value) => return read(V::from_bytes(value)).map(Some),
            }
        }
        let found = (table.of)(&self.tree.tables).get(K::from_bytes(bytes.as_ref()))?;
        found.map(|value| read(value.value())).transpose()
    }

    /// Rows in order, each by `read`; `beside` are changes after all others. They are those of this moment: nothing of the
    /// view is held on to.
    pub(crate) fn range<'k, K: Key, V: Value, T, F>(
        &self,
        table: &Table<K, V>,
        range: Span<K::SelfType<'k>>,
        order: Order,
        beside: Option<&Changes>,
        read: F,
    ) -> Result<Rows<K, V, F>, LedgerError>
    where
        F: FnMut(K::SelfType<'_>, V::SelfType<'_>) -> Result<T, LedgerError>,
    {
        let bytes =
            |bound: &Bound<K::SelfType<'k>>| bound.as_ref().map(|key| K::as_bytes(key).as_ref().to_vec());
        let (from, to) = (bytes(&range.0), bytes(&range.1));
        let is_in = |key: &[u8]| {
            let starts = match &from {
                Bound::Included(from) => K::compare(key, from).is_ge(),
                Bound::Excluded(from) => K::compare(key, from).is_gt(),
                Bound::Unbounded => true,
            };
            let ends = match &to {
                Bound::Included(to) => K::compare(key, to).is_le(),
                Bound::Excluded(to) => K::compare(key, to).is_lt(),
                Bound::Unbounded => true,
            };
            starts && ends
        };
        let mut changed = Vec::new();
        // The latest first: of changes of one row, the first in order is the one that counts.
        for changes in [beside, Some(&self.recent), Some(&self.settling)].into_iter().flatten() {
            let rows = changes.of(table).filter(|(key, _)| is_in(key));
            changed.extend(rows.map(|(key, value)| (key.to_vec(), value.map(<[u8]>::to_vec))));
        }
        changed.sort_by(|(a, _), (b, _)| K::compare(a, b));
        changed.dedup_by(|(a, _), (b, _)| a == b);
        if order == Order::Descending {
            changed.reverse();
        }
        let tree = (table.of)(&self.tree.tables).range::<K::SelfType<'k>>(range)?;
        Ok(Rows { tree, next: None, changed: changed.into_iter().peekable(), order, read })
    }
}

/// A row that was changed, or removed.
type Changed = (Vec<u8>, Option<Vec<u8>>);
type InTree<K, V> = (AccessGuard<'static, K>, AccessGuard<'static, V>);

/// Rows of the tree and changed ones, in one order.
pub(crate) struct Rows<K: Key + 'static, V: Value + 'static, F> {
    tree: Range<'static, K, V>,
    /// The row of the tree that is next, when it was looked at and not told yet.
    next: Option<InTree<K, V>>,
    changed: Peekable<IntoIter<Changed>>,
    order: Order,
    read: F,
}

impl<K: Key, V: Value, F> Rows<K, V, F> {
    fn look_at_tree(&mut self) -> Result<(), StorageError> {
        if self.next.is_none() {
            let found = match self.order {
                Order::Ascending => self.tree.next(),
                Order::Descending => self.tree.next_back(),
            };
            self.next = found.transpose()?;
        }
        Ok(())
    }

    /// How the next row of the tree lies to the next changed one: `Less` when it comes first, or alone.
    fn lies(&mut self) -> Ordering {
        let Some((changed, _)) = self.changed.peek() else { return Ordering::Less };
        let Some((key, _)) = &self.next else { return Ordering::Greater };
        let lies = K::compare(K::as_bytes(&key.value()).as_ref(), changed);
        match self.order {
            Order::Ascending => lies,
            Order::Descending => lies.reverse(),
        }
    }
}

impl<K: Key, V: Value, T, F> Iterator for Rows<K, V, F>
where
    F: FnMut(K::SelfType<'_>, V::SelfType<'_>) -> Result<T, LedgerError>,
{
    type Item = Result<T, LedgerError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Err(error) = self.look_at_tree() {
                return Some(Err(error.into()));
            }
            match self.lies() {
                Ordering::Less => {
                    let (key, value) = self.next.take()?;
                    return Some((self.read)(key.value(), value.value()));
                }
                Ordering::Equal => self.next = None,
                Ordering::Greater => {}
            }
            if let Some((key, Some(value))) = self.changed.next() {
                return Some((self.read)(K::from_bytes(&key), V::from_bytes(&value)));
            }
        }
    }
}
