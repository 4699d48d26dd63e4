//! Which request does what.

use std::sync::Arc;

use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use serde::Deserialize;

use super::answer::ApiError;
use super::body::JsonBody;
use crate::controller::{FlowView, Shared, Stats, Status};
use crate::rule::{Lifetime, Request, RuleRef, RuleView};

/// The user at the other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer(pub Arc<str>);

type Answer<T> = Result<Json<T>, ApiError>;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Nothing {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Deletion {
    #[serde(default)]
    drain: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OneRule {
    rule: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Renewal {
    lifetime: Lifetime,
}

pub fn router(controller: Shared) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/rules", get(list).post(add))
        .route("/v1/rules/{rule}", get(show).patch(set).delete(del))
        .route("/v1/rules/{rule}/renew", post(renew))
        .route("/v1/flows", get(flows))
        .route("/v1/stats", get(stats))
        .fallback(unknown_path)
        .method_not_allowed_fallback(unknown_method)
        .with_state(controller)
}

async fn unknown_path() -> ApiError {
    ApiError::new(
        StatusCode::NOT_FOUND,
        "no such path: there are /v1/status, /v1/rules, /v1/flows and /v1/stats",
    )
}

async fn unknown_method() -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this path does not know that method: see the Allow header")
}

async fn status(
    State(controller): State<Shared>,
    query: Result<Query<Nothing>, QueryRejection>,
) -> Answer<Status> {
    let Nothing {} = asked(query)?;
    Ok(Json(controller.run(|controller| controller.status()).await?))
}

async fn list(
    State(controller): State<Shared>,
    query: Result<Query<Nothing>, QueryRejection>,
) -> Answer<Vec<RuleView>> {
    let Nothing {} = asked(query)?;
    Ok(Json(controller.run(|controller| controller.list()).await?))
}

async fn add(
    State(controller): State<Shared>,
    Extension(Peer(user)): Extension<Peer>,
    query: Result<Query<Nothing>, QueryRejection>,
    JsonBody(request): JsonBody<Request>,
) -> Result<(StatusCode, Json<RuleView>), ApiError> {
    let Nothing {} = asked(query)?;
    let added = controller.run(move |controller| controller.add(&request, &user)).await?;
    let status = if added.replaced { StatusCode::OK } else { StatusCode::CREATED };
    Ok((status, Json(added.rule)))
}

async fn show(
    State(controller): State<Shared>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<Nothing>, QueryRejection>,
) -> Answer<RuleView> {
    let (which, Nothing {}) = (named(path)?, asked(query)?);
    Ok(Json(controller.run(move |controller| controller.show(&which)).await?))
}

async fn set(
    State(controller): State<Shared>,
    Extension(Peer(user)): Extension<Peer>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<Nothing>, QueryRejection>,
    JsonBody(request): JsonBody<Request>,
) -> Answer<RuleView> {
    let (which, Nothing {}) = (named(path)?, asked(query)?);
    Ok(Json(controller.run(move |controller| controller.set(&which, &request, &user)).await?))
}

async fn del(
    State(controller): State<Shared>,
    Extension(Peer(user)): Extension<Peer>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<Deletion>, QueryRejection>,
) -> Answer<RuleView> {
    let (which, Deletion { drain }) = (named(path)?, asked(query)?);
    Ok(Json(controller.run(move |controller| controller.del(&which, drain, &user)).await?))
}

async fn renew(
    State(controller): State<Shared>,
    Extension(Peer(user)): Extension<Peer>,
    path: Result<Path<String>, PathRejection>,
    query: Result<Query<Nothing>, QueryRejection>,
    JsonBody(Renewal { lifetime }): JsonBody<Renewal>,
) -> Answer<RuleView> {
    let (which, Nothing {}) = (named(path)?, asked(query)?);
    Ok(Json(controller.run(move |controller| controller.renew(&which, lifetime, &user)).await?))
}

async fn flows(
    State(controller): State<Shared>,
    query: Result<Query<OneRule>, QueryRejection>,
) -> Answer<Vec<FlowView>> {
    let which = asked(query)?.rule.map(|rule| rule.parse::<RuleRef>()).transpose()?;
    Ok(Json(controller.run(move |controller| controller.flows(which.as_ref())).await?))
}

async fn stats(
    State(controller): State<Shared>,
    query: Result<Query<Nothing>, QueryRejection>,
) -> Answer<Stats> {
    let Nothing {} = asked(query)?;
    Ok(Json(controller.run(|controller| controller.stats()).await?))
}

fn named(path: Result<Path<String>, PathRejection>) -> Result<RuleRef, ApiError> {
    let Path(rule) = path.map_err(|error| ApiError::new(StatusCode::BAD_REQUEST, error.body_text()))?;
    Ok(rule.parse::<RuleRef>()?)
}

fn asked<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, ApiError> {
    match query {
        Ok(Query(value)) => Ok(value),
        Err(error) => {
            let text = error.body_text();
            let why = text.strip_prefix("Failed to deserialize query string: ").unwrap_or(&text);
            Err(ApiError::new(StatusCode::BAD_REQUEST, format!("bad query: {why}")))
        }
    }
}
