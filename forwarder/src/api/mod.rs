//! The controller's interface to the machine: HTTP/1.1 with JSON on a unix socket.

mod answer;
mod body;
mod routes;
mod serve;
mod socket;

pub use answer::ErrorBody;
pub use body::LONGEST_BODY;
pub use routes::Peer;
pub use serve::{Bounds, serve};
pub use socket::ApiSocket;
