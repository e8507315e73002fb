//! On what a directory lies, whether that outlives the container, and what the ledger in it takes.

use std::path::Path;

/// The kind of file system that holds a directory, as Linux tells; `None` where it does not.
pub fn kind_of(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    kind_in(&mounts, &dir)
}

fn kind_in(mounts: &str, dir: &Path) -> Option<String> {
    mounts
        .lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (_, mount, kind) = (words.next()?, words.next()?, words.next()?);
            dir.starts_with(mount).then(|| (mount.len(), kind.to_owned()))
        })
        .max()
        .map(|(_, kind)| kind)
}

/// Whether a file system of this kind goes with its container or machine.
pub fn is_fleeting(kind: &str) -> bool {
    ["tmpfs", "overlay", "ramfs"].contains(&kind)
}

/// What the files of a ledger take, in bytes: all whose names begin as its own does.
///
/// # Errors
/// When the directory cannot be read.
pub fn ledger_bytes(data_dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(data_dir)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b"keybrake.") {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_mount_tells() {
        let mounts = "overlay / overlay rw 0 0\ntmpfs /run tmpfs rw 0 0\n/dev/sda1 /run/keep ext4 rw 0 0\n";
        let kind = |dir: &str| kind_in(mounts, Path::new(dir)).unwrap();
        assert_eq!(
            (kind("/data"), kind("/run/x"), kind("/run/keep/x")),
            ("overlay".into(), "tmpfs".into(), "ext4".into())
        );
        assert!(is_fleeting(&kind("/data")) && !is_fleeting(&kind("/run/keep")));
    }
}
