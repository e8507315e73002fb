//! Where rows are read: a redb ledger, or rows that were loaded from elsewhere.

use redb::{Key, Value};

use crate::ledger::LedgerError;
use crate::ledger::changes::Changes;
use crate::ledger::loaded::{Loaded, LoadedRows};
use crate::ledger::redb::RedbStore;
use crate::ledger::redb::view::{Rows, View};
use crate::ledger::row::{Span, Table};

/// In which order rows are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Order {
    Ascending,
    Descending,
}

/// Where rows are read.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source<'s> {
    /// One moment of a redb ledger.
    View(&'s View),
    /// A redb ledger, each row at its own moment: whoever goes through many keeps nobody from writing.
    Store(&'s RedbStore),
    /// Rows that were loaded.
    Loaded(&'s Loaded),
}

impl<'s> Source<'s> {
    /// What a row is, by `read`.
    pub(crate) fn get<K: Key, V: Value, T>(
        self,
        table: &Table<K, V>,
        key: &K::SelfType<'_>,
        read: impl FnOnce(V::SelfType<'_>) -> Result<T, LedgerError>,
    ) -> Result<Option<T>, LedgerError> {
        match self {
            Self::View(view) => view.get(table, key, read),
            Self::Store(store) => store.view().get(table, key, read),
            Self::Loaded(loaded) => loaded.get(table, key, read),
        }
    }

    /// Rows in order, each by `read`; `beside` are changes after all others.
    pub(crate) fn range<K: Key, V: Value, T, F>(
        self,
        table: &Table<K, V>,
        range: Span<K::SelfType<'_>>,
        order: Order,
        beside: Option<&Changes>,
        read: F,
    ) -> Result<SourceRows<'s, K, V, F>, LedgerError>
    where
        F: FnMut(K::SelfType<'_>, V::SelfType<'_>) -> Result<T, LedgerError>,
    {
        Ok(match self {
            Self::View(view) => SourceRows::Redb(view.range(table, range, order, beside, read)?),
            Self::Store(store) => SourceRows::Redb(store.view().range(table, range, order, beside, read)?),
            Self::Loaded(loaded) => SourceRows::Loaded(loaded.range(table, &range, order, beside, read)),
        })
    }

    /// A row is going to be written.
    pub(crate) fn will_write<K: Key, V: Value>(self, table: &Table<K, V>, key: &K::SelfType<'_>) {
        if let Self::Loaded(loaded) = self {
            loaded.will_write(table, key);
        }
    }
}

/// Rows of either.
#[expect(
    clippy::large_enum_variant,
    reason = "it is gone through where it is made, and redb's is the usual one"
)]
pub(crate) enum SourceRows<'s, K: Key + 'static, V: Value + 'static, F> {
    Redb(Rows<K, V, F>),
    Loaded(LoadedRows<'s, K, V, F>),
}

impl<K: Key, V: Value, T, F> Iterator for SourceRows<'_, K, V, F>
where
    F: FnMut(K::SelfType<'_>, V::SelfType<'_>) -> Result<T, LedgerError>,
{
    type Item = Result<T, LedgerError>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Self::Redb(rows) => rows.next(),
            Self::Loaded(rows) => rows.next(),
        }
    }
}
