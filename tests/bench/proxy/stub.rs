//! The upstream: as little as an answer of Stripe's shape takes, in a process of its own, so that its work is not
//! taken for that of whoever stands in front of it.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::certificates::Files;

/// Where the stub tells how many charges it has executed.
pub(crate) const EXECUTED: &str = "/bench/executed";
const BODY_BYTES_MAX: usize = 65_536;

/// What a card charge looks like, of about the size that Stripe's own have.
const CHARGE: &str = r#"{"id":"ID","object":"charge","amount":AMOUNT,"amount_captured":AMOUNT,"amount_refunded":0,
"application":null,"application_fee":null,"application_fee_amount":null,
"balance_transaction":"txn_1PBenchBenchBench0001",
"billing_details":{"address":{"city":null,"country":null,"line1":null,"line2":null,"postal_code":null,"state":null},
"email":null,"name":null,"phone":null,"tax_id":null},"calculated_statement_descriptor":"BENCH","captured":true,
"created":1784000000,"currency":"usd","customer":"cus_9","description":"billing run","disputed":false,
"failure_balance_transaction":null,"failure_code":null,"failure_message":null,"fraud_details":{},"livemode":false,
"metadata":{},"on_behalf_of":null,"outcome":{"network_status":"approved_by_network","reason":null,
"risk_level":"normal","risk_score":12,"seller_message":"Payment complete.","type":"authorized"},"paid":true,
"payment_intent":null,"payment_method":"card_1PBenchBenchBench0001","payment_method_details":{"card":{"brand":"visa",
"checks":{"address_line1_check":null,"address_postal_code_check":null,"cvc_check":"pass"},"country":"US",
"exp_month":12,"exp_year":2034,"fingerprint":"bench","funding":"credit","installments":null,"last4":"4242",
"mandate":null,"network":"visa","three_d_secure":null,"wallet":null},"type":"card"},"receipt_email":null,
"receipt_number":null,"receipt_url":null,"refunded":false,"review":null,"shipping":null,"source":null,
"source_transfer":null,"statement_descriptor":null,"statement_descriptor_suffix":null,"status":"succeeded",
"transfer_data":null,"transfer_group":null}"#;

/// The answer to a charge.
pub(crate) fn charge(id: &str, amount: &str) -> String {
    CHARGE.replace("AMOUNT", amount).replace("ID", id)
}

#[derive(Default)]
struct Stub {
    executed: AtomicU64,
    asked: AtomicU64,
}

impl Stub {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>> {
        let (head, body) = request.into_parts();
        let form = http_body_util::Limited::new(body, BODY_BYTES_MAX).collect().await;
        let form = form.map_err(anyhow::Error::from_boxed)?.to_bytes();
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        let path = head.uri.path();
        let text = match (&head.method, path.strip_prefix("/v1/charges")) {
            (&Method::POST, Some("")) => {
                let amount = std::str::from_utf8(&form)?
                    .split('&')
                    .find_map(|pair| pair.strip_prefix("amount="))
                    .context("a charge without an amount")?;
                let number = self.executed.fetch_add(1, Ordering::Relaxed);
                charge(&format!("ch_1PBench{number:014}"), amount)
            }
            (&Method::GET, Some(id)) if id.len() > 1 => charge(&id[1..], "100"),
            (&Method::GET, _) if path == "/v1/account" => {
                r#"{"id":"acct_1PBenchBench","object":"account"}"#.to_owned()
            }
            (&Method::GET, _) if path == EXECUTED => self.executed.load(Ordering::Relaxed).to_string(),
            _ => {
                return Ok(Response::builder().status(404).body(Full::new(Bytes::from_static(b"{}")))?);
            }
        };
        let answer = Response::builder()
            .header("content-type", "application/json")
            .header("request-id", format!("req_{asked:014}"));
        Ok(answer.body(Full::new(Bytes::from(text)))?)
    }
}

/// Serves plain HTTP and TLS until the process is ended, or its standard input.
pub(crate) fn run(plain: SocketAddr, tls: SocketAddr, files: &Files) -> Result<()> {
    // Whoever started it holds the other end: it does not outlive a benchmark that was cut off.
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (plain, tls) = (TcpListener::bind(plain).await?, TcpListener::bind(tls).await?);
        let acceptor = TlsAcceptor::from(Arc::new(files.server()?));
        let stub = Arc::new(Stub::default());
        loop {
            tokio::select! {
                accepted = plain.accept() => {
                    tokio::spawn(serve(accepted?.0, None, Arc::clone(&stub)));
                }
                accepted = tls.accept() => {
                    tokio::spawn(serve(accepted?.0, Some(acceptor.clone()), Arc::clone(&stub)));
                }
            }
        }
    })
}

/// One connection. What goes wrong on it is seen by whoever asked, as an answer that is not 200 or none.
async fn serve(stream: TcpStream, acceptor: Option<TlsAcceptor>, stub: Arc<Stub>) {
    let service = service_fn(move |request| {
        let stub = Arc::clone(&stub);
        async move {
            Ok::<_, Infallible>(stub.answer(request).await.unwrap_or_else(|error| {
                let mut response = Response::new(Full::new(Bytes::from(error.to_string())));
                *response.status_mut() = hyper::StatusCode::BAD_REQUEST;
                response
            }))
        }
    });
    let _ = stream.set_nodelay(true);
    match acceptor {
        None => {
            let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        }
        Some(acceptor) => {
            if let Ok(stream) = acceptor.accept(stream).await {
                let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
            }
        }
    }
}
