//! The one source of randomness: the operating system's.

use std::cell::RefCell;

/// Ids that one question to the operating system is enough for. Asking costs as much as a read of a ledger's row, and a
/// charge has three ids.
const IDS_AT_ONCE: usize = 32;
/// Random bytes of an id.
const ID_BYTES: usize = 10;

/// Random bytes.
///
/// # Panics
/// When the operating system has none to give: nothing secret may be made then.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[expect(clippy::expect_used, reason = "without randomness no key may be made and no id is unique")]
    getrandom::fill(&mut bytes).expect("the operating system has no randomness");
    bytes
}

/// Random bytes of an id, which is unique and no secret.
///
/// # Panics
/// As [`bytes()`] does.
pub fn of_id() -> [u8; ID_BYTES] {
    thread_local! {
        static AHEAD: RefCell<Vec<[u8; ID_BYTES]>> = const { RefCell::new(Vec::new()) };
    }
    AHEAD.with_borrow_mut(|ahead| {
        if let Some(random) = ahead.pop() {
            return random;
        }
        let asked: [u8; ID_BYTES * IDS_AT_ONCE] = bytes();
        let (ids, _) = asked.as_chunks();
        ahead.extend_from_slice(ids);
        ahead.pop().unwrap_or_else(bytes)
    })
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn no_id_comes_twice() {
        let draw = || (0..3 * IDS_AT_ONCE).map(|_| of_id()).collect::<Vec<_>>();
        let threads: Vec<_> = (0..2).map(|_| std::thread::spawn(draw)).collect();
        let drawn: Vec<_> =
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).chain(draw()).collect();
        assert_eq!(drawn.iter().collect::<HashSet<_>>().len(), drawn.len());
    }
}
