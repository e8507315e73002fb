//! Changes of rows that are not in the tree yet: in memory, and as the bytes of one frame of the write-ahead log.

use std::collections::HashMap;

use foldhash::fast::RandomState;
use redb::{Key, Value, WriteTransaction};

use crate::ledger::LedgerError;
use crate::ledger::row::{TABLES, Table};

/// In a frame: the row goes.
const REMOVED: u32 = u32::MAX;

/// What changes say of a row.
pub(crate) enum Change<'a> {
    /// Nothing: it is as it was.
    None,
    Removed,
    Put(&'a [u8]),
}

/// Most keys are digests or ids of ours, and the hash has a seed that nobody outside knows.
type Rows = HashMap<Box<[u8]>, Option<Box<[u8]>>, RandomState>;

/// The last change of each row.
#[derive(Debug, Default)]
pub(crate) struct Changes {
    tables: [Rows; TABLES],
}

impl Changes {
    pub(crate) fn is_empty(&self) -> bool {
        self.tables.iter().all(HashMap::is_empty)
    }

    pub(crate) fn put<K: Key, V: Value>(
        &mut self,
        table: &Table<K, V>,
        key: &K::SelfType<'_>,
        value: &V::SelfType<'_>,
    ) {
        let value = Some(V::as_bytes(value).as_ref().into());
        self.tables[usize::from(table.number)].insert(K::as_bytes(key).as_ref().into(), value);
    }

    pub(crate) fn remove<K: Key, V: Value>(&mut self, table: &Table<K, V>, key: &K::SelfType<'_>) {
        self.tables[usize::from(table.number)].insert(K::as_bytes(key).as_ref().into(), None);
    }

    pub(crate) fn get<K: Key, V: Value>(&self, table: &Table<K, V>, key: &[u8]) -> Change<'_> {
        match self.tables[usize::from(table.number)].get(key) {
            None => Change::None,
            Some(None) => Change::Removed,
            Some(Some(value)) => Change::Put(value),
        }
    }

    /// All changed rows of a table, in no order.
    pub(crate) fn of<K: Key, V: Value>(
        &self,
        table: &Table<K, V>,
    ) -> impl Iterator<Item = (&[u8], Option<&[u8]>)> {
        self.tables[usize::from(table.number)].iter().map(|(key, value)| (&**key, value.as_deref()))
    }

    /// All changed rows, by the numbers of their tables.
    pub(crate) fn rows(&self) -> impl Iterator<Item = (usize, impl Iterator<Item = (&[u8], Option<&[u8]>)>)> {
        let tables = self.tables.iter().enumerate().filter(|(_, rows)| !rows.is_empty());
        tables.map(|(table, rows)| (table, rows.iter().map(|(key, value)| (&**key, value.as_deref()))))
    }

    /// Takes in later changes.
    pub(crate) fn join(&mut self, later: Self) {
        for (rows, later) in self.tables.iter_mut().zip(later.tables) {
            if rows.is_empty() {
                *rows = later;
            } else {
                rows.extend(later);
            }
        }
    }

    /// Writes those of one table, in its order: neighbours share pages.
    pub(crate) fn write<K: Key, V: Value>(
        &self,
        table: &Table<K, V>,
        txn: &WriteTransaction,
    ) -> Result<(), LedgerError> {
        let mut rows: Vec<_> = self.of(table).collect();
        if rows.is_empty() {
            return Ok(());
        }
        rows.sort_unstable_by(|(a, _), (b, _)| K::compare(a, b));
        let mut written = txn.open_table(table.definition)?;
        for (key, value) in rows {
            match value {
                Some(value) => drop(written.insert(K::from_bytes(key), V::from_bytes(value))?),
                None => drop(written.remove(K::from_bytes(key))?),
            }
        }
        Ok(())
    }

    /// As bytes: for each row the number of its table, the lengths of its key and its value, and both.
    pub(crate) fn encode(&self) -> Result<Vec<u8>, LedgerError> {
        let too_long = |_| LedgerError::Contradiction("a row is too long");
        let mut bytes = Vec::with_capacity(4_096);
        for (number, rows) in (0_u8..).zip(&self.tables) {
            for (key, value) in rows {
                let key_len = u32::try_from(key.len()).map_err(too_long)?;
                let value_len = value.as_ref().map_or(Ok(REMOVED), |value| u32::try_from(value.len()));
                bytes.push(number);
                bytes.extend(key_len.to_le_bytes());
                bytes.extend(value_len.map_err(too_long)?.to_le_bytes());
                bytes.extend_from_slice(key);
                bytes.extend_from_slice(value.as_deref().unwrap_or_default());
            }
        }
        Ok(bytes)
    }

    /// From the bytes of [`Changes::encode`].
    pub(crate) fn decode(mut bytes: &[u8]) -> Result<Self, LedgerError> {
        const CUT: LedgerError = LedgerError::Corrupt("write-ahead log");
        fn take<'b>(bytes: &mut &'b [u8], len: usize) -> Result<&'b [u8], LedgerError> {
            let (taken, rest) = bytes.split_at_checked(len).ok_or(CUT)?;
            *bytes = rest;
            Ok(taken)
        }
        let mut changes = Self::default();
        while let Some((number, rest)) = bytes.split_first() {
            bytes = rest;
            let key_len = take(&mut bytes, 4)?.try_into().map(u32::from_le_bytes).map_err(|_| CUT)?;
            let value_len = take(&mut bytes, 4)?.try_into().map(u32::from_le_bytes).map_err(|_| CUT)?;
            let key = take(&mut bytes, usize::try_from(key_len).map_err(|_| CUT)?)?;
            let value = match value_len {
                REMOVED => None,
                len => Some(take(&mut bytes, usize::try_from(len).map_err(|_| CUT)?)?.into()),
            };
            let rows = changes.tables.get_mut(usize::from(*number)).ok_or(CUT)?;
            rows.insert(key.into(), value);
        }
        Ok(changes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::row::{AUDIT, DUE, META};

    #[test]
    fn what_is_encoded_is_decoded() {
        let mut changes = Changes::default();
        changes.put(&META, &"a", &b"1".as_slice());
        changes.put(&META, &"a", &b"22".as_slice());
        changes.put(&META, &"", &b"".as_slice());
        changes.remove(&AUDIT, &7);
        changes.put(&DUE, &(1, 2, &[3; 16]), &());
        let long = "x".repeat(70_000);
        changes.put(&META, &long.as_str(), &b"".as_slice());
        let bytes = changes.encode().unwrap();
        let again = Changes::decode(&bytes).unwrap();
        assert_eq!(again.tables, changes.tables);
        assert!(matches!(again.get(&META, b"a"), Change::Put(b"22")));
        assert!(matches!(again.get(&AUDIT, &7_u64.to_le_bytes()), Change::Removed));
        assert!(matches!(again.get(&AUDIT, &8_u64.to_le_bytes()), Change::None));
        for cut in (1..bytes.len()).step_by(7) {
            // Between two rows it is a whole one again.
            if let Ok(less) = Changes::decode(&bytes[..cut]) {
                assert!(less.tables.iter().map(HashMap::len).sum::<usize>() < 5);
            }
        }
        assert!(Changes::decode(&[200, 0, 0, 0, 0, 0, 0, 0, 0]).is_err(), "there is no such table");
    }
}
