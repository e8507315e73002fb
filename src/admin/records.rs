//! The audit log as it is asked for: this sidecar's own records, or through the collector those of all nodes.

use std::collections::BTreeSet;

use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Map, Value, json};

use crate::admin::fields::invalid;
use crate::admin::query::Asked;
use crate::admin::{Admin, Answer, Reader, Shared, json_answer};
use crate::journal::AuditFilter;
use crate::refusal::{Code, Refusal};
use crate::ship::Found;

pub(super) async fn list_records(
    State(admin): Shared,
    headers: HeaderMap,
    Query(query): Query<Vec<(String, String)>>,
) -> Answer {
    let reader = admin.reader(&headers).await?;
    let (of_fleet, query): (Vec<_>, Vec<_>) = query.into_iter().partition(|(name, _)| name == "fleet");
    let all = query.clone();
    let mut asked = admin.checked(Asked::read(query))?;
    let mut filter = admin.checked(asked.records())?;
    let (after, limit) = admin.checked(asked.page(|text| text.parse().ok()))?;
    admin.checked(asked.finish())?;
    match reader {
        Reader::Admin => {}
        Reader::Issuer(issuer) => filter.label_prefix = Some(issuer.label_prefix),
        Reader::VaultKey(key) => filter.equal.push(("label", key.label)),
    }
    match of_fleet.as_slice() {
        [] => {}
        [(_, value)] if value == "true" => return fleet_records(&admin, &headers, &filter, all).await,
        _ => return Err(admin.refuse(invalid("fleet", "must be \"true\", once"))),
    }
    // What was answered before this question is in the answer to it.
    admin.ok(admin.ledger.flush().await)?;
    let page = admin.ok(admin.ledger.audit(filter, after, limit).await)?;
    let data: Vec<Value> = page.items.into_iter().map(Value::Object).collect();
    Ok(records_answer(&headers, &data, page.next, None))
}

/// The same of all nodes. Who may read what is decided here; the collector trusts a node.
async fn fleet_records(
    admin: &Admin,
    headers: &HeaderMap,
    filter: &AuditFilter,
    mut query: Vec<(String, String)>,
) -> Answer {
    let Some(fleet) = &admin.fleet else {
        return Err(admin.refuse(invalid("fleet", "needs a collector of this program (COLLECTOR_URL)")));
    };
    // As the filter says, in which the reader's own bounds are.
    query.retain(|(name, _)| name != "label");
    let labels: BTreeSet<&String> =
        filter.equal.iter().filter(|(name, _)| *name == "label").map(|(_, label)| label).collect();
    if labels.len() > 1 {
        // No record has two.
        return Ok(records_answer(headers, &[], None, Some(Map::new())));
    }
    query.extend(labels.into_iter().map(|label| ("label".to_owned(), label.clone())));
    query.extend(filter.label_prefix.iter().map(|prefix| ("label_prefix".to_owned(), prefix.clone())));
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or("*/*");
    match fleet.records(&query, accept).await {
        Ok(Found { body, kind, next }) => {
            let mut response = body.into_response();
            let kind = kind.unwrap_or(header::HeaderValue::from_static("application/json"));
            response.headers_mut().insert(header::CONTENT_TYPE, kind);
            if let Some(next) = next {
                response.headers_mut().insert("keybrake-next-cursor", next);
            }
            Ok(response)
        }
        Err((status, told)) => {
            tracing::warn!(%status, told, "the collector gave no records");
            Err(admin.refuse(Refusal::new(
                Code::UpstreamUnreachable,
                "The collector gave no answer; without fleet=true this sidecar's own records are answered.",
            )))
        }
    }
}

/// A page of records: a JSON list, or one record a line for who asks so. `as_of` tells of each node how late it may be.
pub fn records_answer(
    headers: &HeaderMap,
    data: &[Value],
    next: Option<u64>,
    as_of: Option<Map<String, Value>>,
) -> Response {
    let wants_lines = headers
        .get(header::ACCEPT)
        .and_then(|accept| accept.to_str().ok())
        .is_some_and(|accept| accept.contains("application/x-ndjson"));
    let next = next.map(|place| place.to_string());
    if !wants_lines {
        let mut body = json!({ "data": data, "has_more": next.is_some(), "next_cursor": next });
        if let Some(as_of) = as_of {
            body["as_of"] = Value::Object(as_of);
        }
        return json_answer(StatusCode::OK, &body);
    }
    let lines = data.iter().fold(String::new(), |lines, record| lines + &record.to_string() + "\n");
    let mut response = ([(header::CONTENT_TYPE, "application/x-ndjson")], lines).into_response();
    if let Some(next) = next.and_then(|next| next.parse().ok()) {
        response.headers_mut().insert("keybrake-next-cursor", next);
    }
    response
}

pub(super) async fn verify(State(admin): Shared, headers: HeaderMap) -> Answer {
    admin.admin(&headers).await?;
    admin.ok(admin.ledger.flush().await)?;
    let state = admin.ok(admin.ledger.search(|reader| reader.verify_chain()).await)?;
    let mut answer = json!({
        "whole": state.broken.is_none(),
        "records": state.records,
        "head": crate::id::hex(&state.head),
    });
    if let Some(broken) = &state.broken {
        answer["first_bad"] = Value::from(broken.seq());
        answer["why"] = Value::from(broken.to_string());
    }
    Ok(json_answer(StatusCode::OK, &answer))
}
