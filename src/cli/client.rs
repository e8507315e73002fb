//! Talks to a running sidecar.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use reqwest::{Method, RequestBuilder};
use serde_json::Value;

use crate::config::ClientConfig;

/// How long one answer may take.
const TIMEOUT_S: u64 = 60;
/// Items of one page.
pub const PAGE: usize = 1_000;

/// A client of one sidecar.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    base: String,
    key: Option<String>,
}

impl Client {
    /// A client as the environment and the flags say.
    ///
    /// # Errors
    /// When the CA file cannot be read.
    pub fn new(config: &ClientConfig) -> Result<Self> {
        let tls = crate::tls::client_config(config.ca.as_deref())?;
        // Nothing may be sent twice by itself, leave for another host, or pass through somebody else's proxy.
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(tls)
            .retry(reqwest::retry::never())
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .timeout(Duration::from_secs(TIMEOUT_S))
            .build()?;
        let key = config.key.as_ref().map(|key| key.secret().expose().to_owned());
        Ok(Self { http, base: config.url.to_string().trim_end_matches('/').to_owned(), key })
    }

    /// Asks with GET.
    ///
    /// # Errors
    /// When no answer comes, or it is a refusal.
    pub async fn get(&self, path: &str, query: &[(String, String)]) -> Result<Value> {
        let query: Vec<String> =
            query.iter().map(|(name, value)| format!("{}={}", escape(name), escape(value))).collect();
        let path = if query.is_empty() { path.to_owned() } else { format!("{path}?{}", query.join("&")) };
        self.send(self.request(Method::GET, &path)).await
    }

    /// Sends JSON with POST.
    ///
    /// # Errors
    /// When no answer comes, or it is a refusal.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.send(self.request(Method::POST, path).json(body)).await
    }

    /// Sends DELETE.
    ///
    /// # Errors
    /// When no answer comes, or it is a refusal.
    pub async fn delete(&self, path: &str) -> Result<Value> {
        self.send(self.request(Method::DELETE, path)).await
    }

    /// All items of a list, page by page, up to `limit`.
    ///
    /// # Errors
    /// When a page does not come.
    pub async fn list(&self, path: &str, query: &[(String, String)], limit: usize) -> Result<Vec<Value>> {
        let mut items = Vec::new();
        let mut cursor: Option<String> = None;
        while items.len() < limit {
            let mut asked = query.to_vec();
            asked.push(("limit".to_owned(), PAGE.min(limit - items.len()).to_string()));
            asked.extend(cursor.take().map(|cursor| ("cursor".to_owned(), cursor)));
            let page = self.get(path, &asked).await?;
            items.extend(page["data"].as_array().cloned().unwrap_or_default());
            match page["next_cursor"].as_str() {
                Some(next) => cursor = Some(next.to_owned()),
                None => break,
            }
        }
        Ok(items)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Value> {
        let answer = request
            .send()
            .await
            .map_err(reqwest::Error::without_url)
            .with_context(|| format!("no answer from {}", self.base))?;
        let status = answer.status();
        let body = answer.bytes().await.map_err(reqwest::Error::without_url)?;
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        if !status.is_success() {
            let error = &body["error"];
            let text = |field: &str| error[field].as_str().unwrap_or_default().to_owned();
            bail!("{} {}: {}", status.as_u16(), text("code"), text("message"));
        }
        Ok(body)
    }
}

fn escape(text: &str) -> String {
    crate::vendor::stripe::form::serialise(&[(String::new(), text.to_owned())])[1..].to_owned()
}
