//! The API from the other end.

use std::fmt;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request as HttpRequest, StatusCode};
use hyper_util::rt::TokioIo;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio::time::timeout;

use crate::api::ErrorBody;
use crate::controller::{Added, FlowView, Stats, Status};
use crate::rule::{Lifetime, Request, RuleId, RuleRef, RuleView};

/// A controller that has not answered by then is taken for dead.
const PATIENCE: Duration = Duration::from_secs(30);

const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~');

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientError {
    /// No controller is there, or it may not be asked.
    Unreachable(String),
    /// It said no.
    Refused { message: String, rule: Option<RuleId> },
    /// It said something that this version does not understand.
    Garbled(String),
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ClientError::Unreachable(message) | ClientError::Garbled(message) => f.write_str(message),
            ClientError::Refused { message, .. } => f.write_str(message),
        }
    }
}

impl std::error::Error for ClientError {}

type Result<T> = std::result::Result<T, ClientError>;

/// Asks the controller at a socket; each question has a connection of its own.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
}

impl Client {
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Client { socket: socket.into() }
    }

    pub async fn status(&self) -> Result<Status> {
        self.get("/v1/status".into()).await
    }

    pub async fn list(&self) -> Result<Vec<RuleView>> {
        self.get("/v1/rules".into()).await
    }

    pub async fn show(&self, rule: &RuleRef) -> Result<RuleView> {
        self.get(rule_path(rule)).await
    }

    pub async fn flows(&self, rule: Option<&RuleRef>) -> Result<Vec<FlowView>> {
        self.get(match rule {
            Some(rule) => format!("/v1/flows?rule={}", encode(rule)),
            None => "/v1/flows".into(),
        })
        .await
    }

    pub async fn stats(&self) -> Result<Stats> {
        self.get("/v1/stats".into()).await
    }

    pub async fn add(&self, request: &Request) -> Result<Added> {
        let (status, bytes) = self.ask(Method::POST, "/v1/rules".into(), json(request)?).await?;
        Ok(Added { rule: understood(&bytes)?, replaced: status == StatusCode::OK })
    }

    pub async fn set(&self, rule: &RuleRef, request: &Request) -> Result<RuleView> {
        self.send(Method::PATCH, rule_path(rule), request).await
    }

    pub async fn renew(&self, rule: &RuleRef, lifetime: Lifetime) -> Result<RuleView> {
        let body = serde_json::json!({ "lifetime": lifetime });
        self.send(Method::POST, format!("{}/renew", rule_path(rule)), &body).await
    }

    pub async fn del(&self, rule: &RuleRef, drain: bool) -> Result<RuleView> {
        let path = rule_path(rule);
        let path = if drain { format!("{path}?drain=true") } else { path };
        understood(&self.ask(Method::DELETE, path, Vec::new()).await?.1)
    }

    async fn get<T: DeserializeOwned>(&self, path: String) -> Result<T> {
        understood(&self.ask(Method::GET, path, Vec::new()).await?.1)
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: String,
        body: &impl Serialize,
    ) -> Result<T> {
        understood(&self.ask(method, path, json(body)?).await?.1)
    }

    /// The status and body of an answer that is no refusal.
    async fn ask(&self, method: Method, path: String, body: Vec<u8>) -> Result<(StatusCode, Bytes)> {
        let (status, bytes) = match timeout(PATIENCE, self.exchange(method, path, body)).await {
            Ok(answer) => answer?,
            Err(_) => return Err(silent(&self.socket)),
        };
        if status.is_success() {
            return Ok((status, bytes));
        }
        Err(match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => ClientError::Refused { message: body.error, rule: body.rule },
            Err(_) => ClientError::Garbled(format!("the controller answered {status}")),
        })
    }

    async fn exchange(&self, method: Method, path: String, body: Vec<u8>) -> Result<(StatusCode, Bytes)> {
        let stream =
            UnixStream::connect(&self.socket).await.map_err(|error| unreachable(&self.socket, &error))?;
        let broken = |error: hyper::Error| {
            ClientError::Unreachable(format!(
                "the controller at {} broke off: {error}",
                self.socket.display()
            ))
        };
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        // Its errors come out of the request as well.
        tokio::spawn(async move { drop(connection.await) });
        let request = HttpRequest::builder()
            .method(method)
            .uri(path)
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|error| ClientError::Garbled(error.to_string()))?;
        let response = sender.send_request(request).await.map_err(broken)?;
        let status = response.status();
        let bytes = response.into_body().collect().await.map_err(broken)?.to_bytes();
        Ok((status, bytes))
    }
}

fn json(body: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(body).map_err(|error| ClientError::Garbled(error.to_string()))
}

fn understood<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    serde_json::from_slice(bytes)
        .map_err(|error| ClientError::Garbled(format!("the controller's answer is not understood: {error}")))
}

fn rule_path(rule: &RuleRef) -> String {
    format!("/v1/rules/{}", encode(rule))
}

fn encode(rule: &RuleRef) -> String {
    utf8_percent_encode(&rule.to_string(), UNRESERVED).to_string()
}

fn silent(socket: &Path) -> ClientError {
    ClientError::Unreachable(format!(
        "the controller at {} does not answer: look at its log, or start it again",
        socket.display()
    ))
}

fn is_socket(path: &Path) -> bool {
    std::fs::metadata(path).is_ok_and(|file| file.file_type().is_socket())
}

fn unreachable(path: &Path, error: &std::io::Error) -> ClientError {
    let socket = path.display();
    ClientError::Unreachable(match error.kind() {
        ErrorKind::NotFound => {
            format!("no controller at {socket}: start forwarderd, or name its socket with --socket")
        }
        // Connecting to any other kind of file is refused in the same way.
        ErrorKind::ConnectionRefused if !is_socket(path) => {
            format!("{socket} is no socket: name the controller's with --socket")
        }
        ErrorKind::ConnectionRefused => {
            format!("the controller at {socket} is gone: start forwarderd again")
        }
        ErrorKind::PermissionDenied => {
            format!("you may not use {socket}: be root, or a member of the group `forwarder`")
        }
        _ => format!("cannot reach a controller at {socket} ({error}): name its socket with --socket"),
    })
}
