//! Takes `client_secret` out of answers: whoever holds one can confirm a payment outside of the proxy.

use std::borrow::Cow;

use memchr::memmem;

const NAME: &[u8] = b"client_secret";

/// The same JSON with the value of every `client_secret` replaced by `null`, at any depth; all other bytes stay.
///
/// A body that is not JSON is returned as it is.
pub fn without_client_secrets(body: &[u8]) -> Cow<'_, [u8]> {
    // Most bodies have none. An escape may spell the name otherwise.
    if memmem::find(body, NAME).is_none() && memchr::memchr(b'\\', body).is_none() {
        return Cow::Borrowed(body);
    }
    let mut out: Option<Vec<u8>> = None;
    let (mut at, mut copied) = (0, 0);
    while let Some(start) = find_quote(body, at) {
        let Some(end) = string_end(body, start) else { break };
        at = end;
        let colon = skip_space(body, end);
        if body.get(colon) != Some(&b':') || !is_client_secret(&body[start..end]) {
            continue;
        }
        let value = skip_space(body, colon + 1);
        if body.get(value) != Some(&b'"') {
            continue;
        }
        let Some(value_end) = string_end(body, value) else { break };
        let out = out.get_or_insert_with(Vec::new);
        out.extend_from_slice(&body[copied..value]);
        out.extend_from_slice(b"null");
        (at, copied) = (value_end, value_end);
    }
    match out {
        None => Cow::Borrowed(body),
        Some(mut out) => {
            out.extend_from_slice(&body[copied..]);
            Cow::Owned(out)
        }
    }
}

fn find_quote(body: &[u8], from: usize) -> Option<usize> {
    body.get(from..)?.iter().position(|byte| *byte == b'"').map(|offset| from + offset)
}

/// The index behind the closing quote of the string that opens at `start`.
fn string_end(body: &[u8], start: usize) -> Option<usize> {
    let mut at = start + 1;
    loop {
        match body.get(at)? {
            b'\\' => at += 2,
            b'"' => return Some(at + 1),
            _ => at += 1,
        }
    }
}

fn skip_space(body: &[u8], from: usize) -> usize {
    let space =
        body.get(from..).unwrap_or_default().iter().take_while(|byte| byte.is_ascii_whitespace()).count();
    from + space
}

/// Compares the name as JSON reads it, so that an escaped spelling does not slip through.
fn is_client_secret(quoted: &[u8]) -> bool {
    quoted == b"\"client_secret\""
        || (quoted.contains(&b'\\')
            && serde_json::from_slice::<String>(quoted).is_ok_and(|name| name == "client_secret"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_client_secret_becomes_null_and_nothing_else_changes() {
        for (before, after) in [
            (r#"{"client_secret": "pi_1_secret_x", "a":1}"#, r#"{"client_secret": null, "a":1}"#),
            (
                r#"{"data":[{"client_secret":"a"},{"x":{"client_secret" : "b\"c"}}]}"#,
                r#"{"data":[{"client_secret":null},{"x":{"client_secret" : null}}]}"#,
            ),
            (r#"{"client\u005fsecret":"a"}"#, r#"{"client\u005fsecret":null}"#),
            (r#"{"client_secret":null}"#, r#"{"client_secret":null}"#),
            (
                r#"{"note":"client_secret","b":"client_secret\": \"x"}"#,
                r#"{"note":"client_secret","b":"client_secret\": \"x"}"#,
            ),
            ("garbage \"", "garbage \""),
            ("", ""),
        ] {
            assert_eq!(without_client_secrets(before.as_bytes()), after.as_bytes(), "{before}");
        }
    }
}
