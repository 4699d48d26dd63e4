//! Connections: how many, how slow, and whose.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use log::{debug, warn};
use nix::unistd::{Uid, User};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};
use tokio_io_timeout::TimeoutStream;

use super::body::BodyTime;
use super::routes::{Peer, router};
use super::socket::ApiSocket;
use crate::controller::Shared;

/// What clients may take of the daemon.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Connections at once; further ones wait until one ends.
    pub connections: u32,
    /// The longest silence: within a request, between requests, and of a client that does not read.
    pub silence: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Bounds { connections: 256, silence: Duration::from_secs(10) }
    }
}

/// Answers requests until `stop` is done, then lets those under way end.
pub async fn serve(socket: ApiSocket, controller: Shared, bounds: Bounds, stop: impl Future<Output = ()>) {
    let router = router(controller).layer(Extension(BodyTime(bounds.silence)));
    let places = Arc::new(Semaphore::new(bounds.connections as usize));
    let (stopping, stopped) = watch::channel(false);
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = accept(&socket, &places) => accepted,
            () = &mut stop => break,
        };
        let Some((stream, place)) = accepted else { continue };
        let (router, stopped) = (router.clone(), stopped.clone());
        tokio::spawn(async move {
            converse(stream, router, bounds, stopped).await;
            drop(place);
        });
    }
    drop(socket);
    // Nobody is left to hear it where all connections have ended already.
    let _ = stopping.send(true);
    let all_ended = places.acquire_many(bounds.connections);
    let _ = timeout(Duration::from_secs(2), all_ended).await;
}

/// The next connection, once there is a place for it.
async fn accept(
    socket: &ApiSocket,
    places: &Arc<Semaphore>,
) -> Option<(UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let place = Arc::clone(places).acquire_owned().await.ok()?;
    match socket.listener.accept().await {
        Ok((stream, _)) => Some((stream, place)),
        Err(error) => {
            // Most likely out of file descriptors: that passes, but not faster by trying harder.
            warn!("cannot accept a connection: {error}");
            sleep(Duration::from_millis(100)).await;
            None
        }
    }
}

async fn converse(stream: UnixStream, router: Router, bounds: Bounds, mut stopped: watch::Receiver<bool>) {
    let user = match stream.peer_cred() {
        Ok(credentials) => user_name(credentials.uid()),
        Err(error) => return warn!("a connection without a user is closed: {error}"),
    };
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(bounds.silence));
    let service = TowerToHyperService::new(router.layer(Extension(Peer(user))));
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(bounds.silence)
        .max_buf_size(64 << 10)
        .serve_connection(TokioIo::new(Box::pin(stream)), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = &mut connection => ended,
        _ = async { stopped.wait_for(|stopped| *stopped).await.is_ok() } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        debug!("a connection ended early: {error}");
    }
}

fn user_name(uid: u32) -> Arc<str> {
    match User::from_uid(Uid::from_raw(uid)) {
        Ok(Some(user)) => user.name.into(),
        _ => format!("uid {uid}").into(),
    }
}
