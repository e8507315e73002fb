//! The write-ahead log: a file of a fixed size beside the tree. A batch is one frame in it, durable by one sync of bytes
//! that have their place on the disk already.
//!
//! | part | what |
//! |---|---|
//! | two heads | [`MAGIC`], an epoch (16 bytes: the run of the process that writes), CRC-32 of both |
//! | half 0, half 1 | frames, one behind the other |
//!
//! A frame is its CRC-32 (over the epoch and all that follows), its number and the length of its payload, then
//! the payload. Numbers go up by one, over all epochs. While one half is taken into the tree, the other one is written;
//! so nothing is overwritten that the tree does not have. What is found at the next start is the run of valid frames
//! with consecutive numbers: a frame that was cut short ends it, and nobody was told of that one. Each run writes the
//! head that the tree does not name, and then the tree names its own.

use redb::StorageBackend;

use crate::ledger::LedgerError;
use crate::ledger::changes::Changes;

const MAGIC: &[u8; 16] = b"keybrake wal 1\r\n";
const EPOCH_BYTES: usize = 16;
const CRC_BYTES: usize = 4;
/// The place of both heads, so that frames never share a page with them.
const HEAD_BYTES: u64 = 4_096;
/// Where they are: in sectors of their own, so that one that is cut short leaves the other one.
const HEADS_AT: [u64; 2] = [0, HEAD_BYTES / 2];
/// CRC, number and length.
const FRAME_HEAD_BYTES: usize = CRC_BYTES + 8 + 4;
/// Of a file that is made. One that is there has the halves that its length gives.
const HALF_BYTES: u64 = 16 << 20;
const HALF_BYTES_MIN: u64 = 4_096;

/// Names one run of the process.
pub(crate) type Epoch = [u8; EPOCH_BYTES];

/// A log that is written.
#[derive(Debug)]
pub(crate) struct Wal {
    file: Box<dyn StorageBackend>,
    epoch: Epoch,
    half_bytes: u64,
    /// The half that is written, and where in it the next frame begins.
    half: u64,
    at: u64,
    /// The number of the last frame.
    last: u64,
}

#[expect(clippy::needless_pass_by_value, reason = "it is mapped over")]
fn failed(error: std::io::Error) -> LedgerError {
    LedgerError::Unavailable(format!("the write-ahead log: {error}"))
}

fn half_bytes(len: u64) -> u64 {
    len.saturating_sub(HEAD_BYTES) / 2
}

fn crc(epoch: &Epoch, parts: &[&[u8]]) -> [u8; CRC_BYTES] {
    let mut crc = crc32fast::Hasher::new();
    crc.update(epoch);
    for part in parts {
        crc.update(part);
    }
    crc.finalize().to_le_bytes()
}

/// The epochs that a file names. One that is no log, or was not made whole, names none.
pub(crate) fn epochs(file: &dyn StorageBackend) -> Result<[Option<Epoch>; 2], LedgerError> {
    let mut epochs = [None; 2];
    if half_bytes(file.len().map_err(failed)?) < HALF_BYTES_MIN {
        return Ok(epochs);
    }
    for (found, at) in epochs.iter_mut().zip(HEADS_AT) {
        let mut head = [0; MAGIC.len() + EPOCH_BYTES + CRC_BYTES];
        file.read(at, &mut head).map_err(failed)?;
        let parts = head.strip_prefix(MAGIC).and_then(<[u8]>::split_first_chunk::<EPOCH_BYTES>);
        *found = parts.filter(|(epoch, sum)| crc(epoch, &[MAGIC]) == *sum).map(|(epoch, _)| *epoch);
    }
    Ok(epochs)
}

/// The frames of an epoch, in the order of their numbers.
pub(crate) fn frames(file: &dyn StorageBackend, epoch: &Epoch) -> Result<Vec<(u64, Changes)>, LedgerError> {
    let half_bytes = half_bytes(file.len().map_err(failed)?);
    let mut runs = Vec::new();
    for half in [0, 1] {
        let len = usize::try_from(half_bytes).map_err(|_| LedgerError::Corrupt("write-ahead log"))?;
        let mut bytes = vec![0; len];
        file.read(HEAD_BYTES + half * half_bytes, &mut bytes).map_err(failed)?;
        runs.push(run(epoch, &bytes)?);
    }
    runs.sort_by_key(|run: &Vec<_>| run.first().map(|(number, _)| *number));
    Ok(runs.into_iter().flatten().collect())
}

/// The valid frames from the beginning of a half.
fn run(epoch: &Epoch, mut bytes: &[u8]) -> Result<Vec<(u64, Changes)>, LedgerError> {
    let mut frames: Vec<(u64, Changes)> = Vec::new();
    while let Some((sum, rest)) = bytes.split_first_chunk::<CRC_BYTES>()
        && let Some((number_bytes, behind)) = rest.split_first_chunk::<8>()
        && let Some((len_bytes, behind)) = behind.split_first_chunk::<4>()
        && let Some((payload, behind)) =
            usize::try_from(u32::from_le_bytes(*len_bytes)).ok().and_then(|len| behind.split_at_checked(len))
        && crc(epoch, &[number_bytes, len_bytes, payload]) == *sum
    {
        let number = u64::from_le_bytes(*number_bytes);
        let follows = frames.last().is_none_or(|(last, _)| last.checked_add(1) == Some(number));
        if !follows {
            break;
        }
        frames.push((number, Changes::decode(payload)?));
        bytes = behind;
    }
    Ok(frames)
}

impl Wal {
    /// Makes a file whole, with every byte in its place on the disk, or takes one as long as it is.
    pub(crate) fn lay_out(file: &dyn StorageBackend) -> Result<(), LedgerError> {
        if half_bytes(file.len().map_err(failed)?) >= HALF_BYTES_MIN {
            return Ok(());
        }
        let zeros = vec![0; 64 << 10];
        // It grows as it is written, so one that was cut short on a full disk is too short.
        let (mut at, len) = (0, HEAD_BYTES + 2 * HALF_BYTES);
        while at < len {
            let left = usize::try_from(len - at).unwrap_or(usize::MAX).min(zeros.len());
            file.write(at, &zeros[..left]).map_err(failed)?;
            at += left as u64;
        }
        file.sync_data().map_err(failed)
    }

    /// Begins an epoch behind a frame that the tree has, or will have in a moment: until then `before` stays named, and its
    /// frames stay.
    pub(crate) fn begin(
        file: Box<dyn StorageBackend>,
        epoch: Epoch,
        before: Option<Epoch>,
        last: u64,
    ) -> Result<Self, LedgerError> {
        let half_bytes = half_bytes(file.len().map_err(failed)?);
        let head = [MAGIC.as_slice(), &epoch, &crc(&epoch, &[MAGIC])].concat();
        let [first, _] = epochs(&*file)?;
        let [one, other] = HEADS_AT;
        file.write(if first.is_some() && first == before { other } else { one }, &head).map_err(failed)?;
        file.sync_data().map_err(failed)?;
        Ok(Self { file, epoch, half_bytes, half: 0, at: 0, last })
    }

    /// Writes a frame durably. Answers whether there was room for it in this half.
    pub(crate) fn append(&mut self, payload: &[u8]) -> Result<bool, LedgerError> {
        let frame_bytes = (FRAME_HEAD_BYTES + payload.len()) as u64;
        let Ok(len) = u32::try_from(payload.len()) else { return Ok(false) };
        if self.half_bytes.saturating_sub(self.at) < frame_bytes {
            return Ok(false);
        }
        let number = self.last + 1;
        let (number_bytes, len_bytes) = (number.to_le_bytes(), len.to_le_bytes());
        let sum = crc(&self.epoch, &[&number_bytes, &len_bytes, payload]);
        let frame = [sum.as_slice(), &number_bytes, &len_bytes, payload].concat();
        self.file.write(HEAD_BYTES + self.half * self.half_bytes + self.at, &frame).map_err(failed)?;
        self.file.sync_data().map_err(failed)?;
        (self.last, self.at) = (number, self.at + frame_bytes);
        Ok(true)
    }

    /// Goes on in the other half, of which the tree has everything. Answers the number of the last frame before.
    pub(crate) fn switch(&mut self) -> u64 {
        (self.half, self.at) = (1 - self.half, 0);
        self.last
    }

    /// Whether the tree should take this half in before it is full.
    pub(crate) fn is_filling(&self) -> bool {
        self.at > self.half_bytes / 2
    }
}

impl Drop for Wal {
    fn drop(&mut self) {
        // Whoever opens it next finds it as it is.
        let _ = self.file.close();
    }
}

#[cfg(test)]
mod tests {
    use redb::backends::InMemoryBackend;

    use super::*;

    fn image(file: &dyn StorageBackend) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.len().unwrap()).unwrap()];
        file.read(0, &mut bytes).unwrap();
        bytes
    }

    fn of(bytes: &[u8]) -> Box<dyn StorageBackend> {
        let file = InMemoryBackend::new();
        file.set_len(bytes.len() as u64).unwrap();
        file.write(0, bytes).unwrap();
        Box::new(file)
    }

    /// The file after a run of this epoch that did nothing.
    fn after(bytes: &[u8], epoch: Epoch, before: Option<Epoch>) -> Vec<u8> {
        image(&*Wal::begin(of(bytes), epoch, before, 0).unwrap().file)
    }

    #[test]
    fn a_head_that_is_cut_short_leaves_the_one_before() {
        let (mut bytes, mut before) = (vec![0; 3 * 4_096], None);
        for n in 1..=4 {
            let epoch = [n; EPOCH_BYTES];
            let whole = after(&bytes, epoch, before);
            assert!(epochs(&*of(&whole)).unwrap().contains(&Some(epoch)));
            let written: Vec<usize> = (0..whole.len()).filter(|at| whole[*at] != bytes[*at]).collect();
            for cut in &written {
                let torn = [&whole[..*cut], &bytes[*cut..]].concat();
                let found = epochs(&*of(&torn)).unwrap();
                assert!(before.is_none() || found.contains(&before), "{n} {cut}: {found:?}");
            }
            (bytes, before) = (whole, Some(epoch));
        }
    }

    #[test]
    fn a_run_ends_at_what_is_no_frame_of_it() {
        let epoch = [7; EPOCH_BYTES];
        let mut wal = Wal::begin(of(&vec![0; 4_096 + 2 * 4_096]), epoch, None, 40).unwrap();
        let payload = Changes::default().encode().unwrap();
        for _ in 0..3 {
            assert!(wal.append(&payload).unwrap());
        }
        assert_eq!(wal.switch(), 43);
        assert!(wal.append(&payload).unwrap());
        assert!(!wal.append(&vec![0; 4_096]).unwrap(), "there is no room for it");
        let whole = image(&*wal.file);
        let numbers = |bytes: &[u8], epoch: &Epoch| -> Vec<u64> {
            frames(&*of(bytes), epoch).unwrap().into_iter().map(|(number, _)| number).collect()
        };
        assert_eq!(numbers(&whole, &epoch), [41, 42, 43, 44]);
        assert_eq!(numbers(&whole, &[8; EPOCH_BYTES]), [0; 0], "of another epoch");
        for byte in 0..FRAME_HEAD_BYTES {
            let mut damaged = whole.clone();
            damaged[4_096 + FRAME_HEAD_BYTES + byte] ^= 1;
            assert_eq!(numbers(&damaged, &epoch), [41, 44], "the second is no frame any more: {byte}");
        }
        // Written over, what is left behind the new frames is older.
        assert_eq!(wal.switch(), 44);
        assert!(wal.append(&payload).unwrap());
        assert_eq!(numbers(&image(&*wal.file), &epoch), [44, 45]);
    }
}
