//! Reading a request's body: JSON, bounded in size and in time.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::answer::ApiError;

/// The longest body that is read.
pub const LONGEST_BODY: usize = 1 << 20;

/// How much more is swallowed, so that a client that is still sending gets to see the refusal.
const SWALLOWED: usize = 8 << 20;

/// How long a client may take to send a body; put into the request by the server.
#[derive(Clone, Copy, Debug)]
pub struct BodyTime(pub Duration);

/// A body as a value.
pub struct JsonBody<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _state: &S) -> Result<Self, ApiError> {
        let (parts, body) = request.into_parts();
        let kind = parts.headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
        let json = kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case("application/json");
        let time = parts.extensions.get().map_or(Duration::from_secs(10), |BodyTime(time)| *time);
        let bytes = match timeout(time, read(body)).await {
            Ok(bytes) => bytes?,
            Err(_) => {
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not arrive in time"));
            }
        };
        if !json {
            let line = "the body has to be JSON: send it with `Content-Type: application/json`";
            return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, line));
        }
        parse(&bytes).map(JsonBody).map_err(|line| ApiError::new(StatusCode::BAD_REQUEST, line))
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    // serde would also take an array for a struct.
    if bytes.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err("the body has to be a JSON object, as {\"enabled\": true}".to_owned());
    }
    let mut json = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let field = error.path().to_string();
        let text = error.inner().to_string();
        if !error.inner().is_data() {
            return format!("bad JSON: {text}");
        }
        // A value is wrong: it is the field that says which, not its place in the text.
        let line = text.split(" at line ").next().unwrap_or_default();
        let named = field == "." || line.starts_with(&field);
        if named { line.to_owned() } else { format!("{field}: {line}") }
    })?;
    json.end().map_err(|error| format!("bad JSON: {error}"))?;
    Ok(value)
}

async fn read(mut body: Body) -> Result<Vec<u8>, ApiError> {
    let mut bytes = Vec::new();
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|_| ApiError::new(StatusCode::BAD_REQUEST, "the body ended before its time"))?;
        let Ok(data) = frame.into_data() else { continue };
        length += data.len();
        if length <= LONGEST_BODY {
            bytes.extend_from_slice(&data);
        } else if length > SWALLOWED {
            break;
        }
    }
    if length > LONGEST_BODY {
        let line = format!("the body is too long: {LONGEST_BODY} bytes are the most");
        return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, line));
    }
    Ok(bytes)
}
