//! The log outside of the sidecar: exported, checked by another process that has no ledger, and told in plain words.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::dice::Dice;
use crate::standin::faults::Fault;
use crate::support::{ADMIN_KEY, Sidecar, run, world};

type Env = BTreeMap<String, String>;

fn client_env(sidecar: &Sidecar) -> Env {
    let set = |name: &str, value: &str| (format!("KEYBRAKE_{name}"), value.to_owned());
    Env::from([set("URL", &sidecar.base), set("ADMIN_KEY", ADMIN_KEY)])
}

/// Runs a command without any sidecar or setting.
fn alone(arguments: &[&str]) -> (i32, String) {
    let (code, told, complaint) = run(&Env::new(), arguments);
    (code, told + &complaint)
}

/// Checks a file; answers the exit code and the verdict.
fn verify(file: &Path, more: &[&str]) -> (i32, Value) {
    let arguments = [&["audit", "verify", "--json", "--file", file.to_str().unwrap()], more].concat();
    let (code, told, complaint) = run(&Env::new(), &arguments);
    (code, serde_json::from_str(&told).unwrap_or_else(|_| panic!("{told}{complaint}")))
}

/// A log with something of everything in it, and the export of it.
async fn exported(dir: &Path) -> (Sidecar, Vec<String>, Value) {
    let (standin, sidecar) = world().await;
    let metadata = json!({"metadata": {"flow": "Abrechnung – ü \"q\" \\ \u{1b}[31m\n 猫"}});
    let (key, _) = sidecar.mint("50.00", metadata).await;
    sidecar.charge(&key, "paid", 1_000, "cus_ü").await;
    sidecar.charge(&key, "paid", 1_000, "cus_ü").await;
    sidecar.charge(&key, "much", 900_000, "cus_9").await;
    standin.fault(Fault::Decline);
    sidecar.charge(&key, "declined", 500, "cus_9").await;
    standin.fault(Fault::DropAfter);
    sidecar.charge(&key, "lost", 700, "cus_9").await;
    sidecar.charge(&key, "lost", 700, "cus_9").await;
    let file = dir.join("log.ndjson");
    let arguments = ["audit", "export", "--json", "--out", file.to_str().unwrap()];
    let (code, told, complaint) = run(&client_env(&sidecar), &arguments);
    assert_eq!((code, told.as_str()), (0, ""), "{complaint}");
    let text = std::fs::read_to_string(&file).unwrap();
    let lines = text.lines().map(str::to_owned).collect();
    (sidecar, lines, serde_json::from_str(&complaint).unwrap())
}

fn write(path: &Path, lines: &[String]) {
    std::fs::write(path, lines.join("\n") + "\n").unwrap();
}

#[tokio::test]
async fn an_export_is_whole_and_says_how_to_tell() {
    let dir = tempfile::tempdir().unwrap();
    let (sidecar, lines, told) = exported(dir.path()).await;
    let env = client_env(&sidecar);
    let file = dir.path().join("log.ndjson");
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600, "it holds personal data");
    assert_eq!(told["records"], lines.len());
    let verdict = sidecar.admin("GET", "/audit/verify", None).await.body;
    assert_eq!(told["head"], verdict["head"]);
    let (head, count) = (told["head"].as_str().unwrap(), lines.len().to_string());
    let (code, verdict) = verify(&file, &["--head", head, "--records", &count]);
    assert_eq!((code, &verdict["whole"], &verdict["records"]), (0, &json!(true), &json!(lines.len())));
    // To standard output the same, and as `tail` prints it.
    let (code, printed, complaint) = run(&env, &["audit", "export"]);
    assert_eq!((code, printed.lines().collect::<Vec<_>>()), (0, lines.iter().map(String::as_str).collect()));
    assert_eq!(complaint.trim(), format!("{count} records, head {head}"));
    for arguments in [vec!["audit", "tail"], vec!["audit", "tail", "--json"]] {
        assert_eq!(run(&env, &arguments), (0, printed.clone(), String::new()));
    }
    let (code, filtered, complaint) = run(&env, &["audit", "export", "customer=cus_9"]);
    assert!(
        code == 0 && filtered.lines().count() < lines.len() && complaint.contains("no chain"),
        "{complaint}"
    );
    assert!(filtered.lines().all(|line| line.contains("cus_9")));
    assert_eq!(run(&env, &["audit", "export", "customer"]).0, 64);
    assert_eq!(run(&env, &["audit", "export", "colour=red"]).0, 1);
    assert_eq!(run(&env, &["audit", "export", "--out", "/nowhere/at/all"]).0, 1);
    assert_eq!(run(&env, &["audit", "verify", "--head", head]).0, 64, "a head is of a file");
}

/// Whatever was done to a file, the check finds it and names the record.
#[tokio::test]
async fn every_change_of_an_export_is_found_and_named() {
    let dir = tempfile::tempdir().unwrap();
    let (_sidecar, lines, told) = exported(dir.path()).await;
    let head = told["head"].as_str().unwrap();
    let file = dir.path().join("changed.ndjson");
    let mut dice = Dice::new(20_261_124);
    let last = lines.len() - 1;
    for round in 0..60 {
        // Not the first line: where a file begins, it is taken at its word.
        let at = 1 + dice.below(last);
        let seq = u64::try_from(at).unwrap() + 1;
        let mut changed = lines.clone();
        let (what, named) = match round % 5 {
            0 => {
                let mut bytes = changed[at].clone().into_bytes();
                let (byte, bit) = (dice.below(bytes.len()), dice.below(7));
                bytes[byte] ^= 1 << bit;
                let mut whole = lines[..at].join("\n").into_bytes();
                whole.push(b'\n');
                whole.extend(&bytes);
                whole.push(b'\n');
                whole.extend(lines[at + 1..].join("\n").into_bytes());
                std::fs::write(&file, whole).unwrap();
                let same = |line: &[u8]| serde_json::from_slice::<Value>(line).ok();
                if same(&bytes) == same(lines[at].as_bytes()) {
                    // Another spelling of the very same record, such as \u001F for \u001f.
                    continue;
                }
                ("a flipped bit", seq)
            }
            1 if at < last => {
                changed.remove(at);
                write(&file, &changed);
                ("a removed record", seq)
            }
            2 => {
                changed.insert(at, lines[dice.below(lines.len())].clone());
                write(&file, &changed);
                // A record that is put in twice in a row is seen at the second one.
                let same = changed[at] == lines[at];
                ("an inserted record", if same { seq + 1 } else { seq })
            }
            3 if at < last => {
                changed.swap(at, at + 1);
                write(&file, &changed);
                ("swapped records", seq)
            }
            _ => {
                changed.truncate(at);
                write(&file, &changed);
                ("a cut tail", seq)
            }
        };
        let (code, verdict) = verify(&file, &["--head", head]);
        assert_eq!((code, &verdict["whole"]), (1, &json!(false)), "{what} at {seq}: {verdict}");
        assert_eq!(verdict["first_bad"], json!(named), "{what} at {seq}: {verdict}");
        let why = verdict["why"].as_str().unwrap();
        assert!(why.contains(&format!("record {named} ")), "{what}: {why}");
    }
}

#[tokio::test]
async fn what_is_missing_at_an_end_is_told_by_the_count_and_the_head() {
    let dir = tempfile::tempdir().unwrap();
    let (_sidecar, lines, told) = exported(dir.path()).await;
    let (head, count) = (told["head"].as_str().unwrap(), lines.len().to_string());
    let file = dir.path().join("part.ndjson");
    write(&file, &lines[..4]);
    assert_eq!(verify(&file, &[]).0, 0, "on its own it is as whole as an export of that day");
    let (code, verdict) = verify(&file, &["--records", &count]);
    assert_eq!((code, &verdict["first_bad"]), (1, &json!(5)), "{verdict}");
    assert_eq!(verify(&file, &["--records", "4", "--head", head]).1["first_bad"], 4, "another head");
    assert_eq!(verify(&file, &["--records", "3"]).1["first_bad"], 4);
    write(&file, &lines[3..]);
    let (code, verdict) = verify(&file, &["--head", head]);
    assert_eq!((code, &verdict["first"]), (0, &json!(4)), "it says where it begins");
    let (code, verdict) = verify(&file, &["--head", head, "--records", &count]);
    assert_eq!((code, &verdict["first_bad"]), (1, &json!(3)), "{verdict}");
    std::fs::write(&file, "").unwrap();
    assert_eq!(verify(&file, &["--head", head]).0, 1);
    for first in ["no record", "{}", "{\"seq\": 2}", "\u{0}"] {
        std::fs::write(&file, first).unwrap();
        let (code, verdict) = verify(&file, &[]);
        assert_eq!((code, &verdict["why"]), (1, &json!("line 1 is no audit record")), "{first}");
    }
}

/// The lines of Python that `src/audit.rs` documents, on a real export.
#[tokio::test]
async fn the_documented_python_checks_an_export() {
    let dir = tempfile::tempdir().unwrap();
    let (_sidecar, lines, _) = exported(dir.path()).await;
    let documented: Vec<&str> = include_str!("../../src/audit.rs")
        .lines()
        .skip_while(|line| *line != "//! ```python")
        .skip(1)
        .take_while(|line| *line != "//! ```")
        .map(|line| line.strip_prefix("//! ").unwrap())
        .collect();
    assert_eq!(documented.len(), 3);
    let script = format!(
        "import hashlib, json, sys\nFIELDS = {:?}\nprev = '0' * 64\n\
         for line in open(sys.argv[1], encoding='utf-8'):\n record = json.loads(line)\n {}\n \
         assert record['prev_hash'] == prev\n prev = record['hash']\nprint(prev)\n",
        keybrake::audit::FIELDS,
        documented.join("\n ")
    );
    let check = |file: &Path| {
        let ran = Command::new("python3").arg("-c").arg(&script).arg(file).output().unwrap();
        (ran.status.success(), String::from_utf8(ran.stdout).unwrap().trim().to_owned())
    };
    let last: Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    assert_eq!(check(&dir.path().join("log.ndjson")), (true, last["hash"].as_str().unwrap().to_owned()));
    let forged = dir.path().join("forged.ndjson");
    let mut changed = lines;
    let at = changed.iter().position(|line| line.contains("\"amount\":700")).unwrap();
    changed[at] = changed[at].replace("\"amount\":700", "\"amount\":701");
    write(&forged, &changed);
    assert!(!check(&forged).0);
}

#[tokio::test]
async fn a_call_is_explained_by_whatever_somebody_knows_of_it() {
    let dir = tempfile::tempdir().unwrap();
    let (sidecar, _, _) = exported(dir.path()).await;
    let env = client_env(&sidecar);
    let (file, nobody) = (dir.path().join("log.ndjson"), dir.path().join("none.ndjson"));
    let file = file.to_str().unwrap();
    let records = sidecar.audit("events=all&idempotency_key=lost").await;
    let (doubt, resolved) = (&records[1], &records[3]);
    let named = |field: &str, record: &Value| record[field].as_str().unwrap().to_owned();
    for id in [
        named("call_id", doubt),
        named("hold_id", doubt),
        named("request_id", doubt),
        named("stripe_request_id", resolved),
        named("object_id", resolved),
        "lost".to_owned(),
    ] {
        let (code, told, complaint) = run(&env, &["audit", "explain", &id]);
        assert_eq!(code, 0, "{id}: {complaint}");
        for sentence in [
            "It was let through: 7.00 USD was reserved before anything was sent.",
            "nobody here knows whether Stripe executed it: 7.00 USD stays counted.",
            "The doubt ended. Stripe executed it: 7.00 USD is spent.",
            "The answer to the same call, sent again, says so.",
            "Its idempotency key is \"lost\".",
            "labelled \"of-a-test\", for cus_9, flow Abrechnung",
        ] {
            assert!(told.contains(sentence), "{id}: {sentence}\n{told}");
        }
        assert!(!told.contains('\u{1b}'), "nothing of a record reaches the terminal as a command");
        assert_eq!(told.matches("Its idempotency key").count(), 1, "what was said is not said again: {told}");
        // An export tells the same, without a sidecar.
        assert_eq!(alone(&["audit", "explain", &id, "--file", file]), (0, told), "{id}");
        let (_, json, _) = run(&env, &["audit", "explain", &id, "--json"]);
        let json: Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["events"].as_array().unwrap().len(), 4, "{json}");
        assert_eq!(json["events"][1]["record"], *doubt);
        assert!(json["events"].as_array().unwrap().iter().all(|event| event["says"][0].is_string()));
    }
    let refused = &sidecar.audit("decision=refused").await[0];
    let (code, told, _) = run(&env, &["audit", "explain", &named("request_id", refused)]);
    let figures = "It asked for 9000.00 USD. Of the limit (daily) of 50.00 USD, 10.00 were spent and 0.00 held: 40.00 \
                   were left.";
    assert!(code == 0 && told.contains("Why: spend_cap_exceeded.") && told.contains(figures), "{told}");
    assert_eq!(run(&env, &["audit", "explain", "call_nobody"]).0, 1);
    std::fs::write(&nobody, "").unwrap();
    assert_eq!(alone(&["audit", "explain", "lost", "--file", nobody.to_str().unwrap()]).0, 1);
}
