//! The controller as several tasks use it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval, sleep};

use super::{Controller, Error};
use crate::rule::now;

/// One controller for many tasks; operations come one after the other.
#[derive(Clone)]
pub struct Shared {
    controller: Arc<Mutex<Controller>>,
    touched: Arc<Notify>,
}

impl Shared {
    pub fn new(controller: Controller) -> Self {
        Shared { controller: Arc::new(Mutex::new(controller)), touched: Arc::new(Notify::new()) }
    }

    /// Runs an operation where it may wait for the disk and the kernel.
    pub async fn run<T: Send + 'static>(
        &self,
        operation: impl FnOnce(&mut Controller) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let controller = Arc::clone(&self.controller);
        let touched = Arc::clone(&self.touched);
        let work = move || {
            // An operation that panicked has not committed: the controller is as before it.
            let mut controller = controller.lock().unwrap_or_else(PoisonError::into_inner);
            let before = controller.next_expiry();
            let result = operation(&mut controller);
            if controller.next_expiry() != before {
                touched.notify_one();
            }
            result
        };
        tokio::task::spawn_blocking(work)
            .await
            .unwrap_or_else(|error| Err(anyhow!(error).context("the controller failed inside").into()))
    }

    /// Lets rules end in their second and does what is due once a second, for ever.
    pub async fn keep_time(self) -> anyhow::Result<()> {
        let mut seconds = interval(Duration::from_secs(1));
        seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let end =
                self.run(|controller| Ok(controller.next_expiry())).await.context("cannot keep time")?;
            let left = end.map(|end| Duration::try_from(end.duration_since(now())).unwrap_or_default());
            tokio::select! {
                _ = seconds.tick() => self.run(|controller| { controller.tick(now()); Ok(()) }).await?,
                () = sleep(left.unwrap_or_default()), if left.is_some() => self.expire().await,
                () = self.touched.notified() => {}
            }
        }
    }

    async fn expire(&self) {
        // A millisecond on, so that the end itself has passed.
        sleep(Duration::from_millis(1)).await;
        let failed = self.run(|controller| controller.expire_due(now())).await.is_err();
        if failed {
            // The next tick tells it, and tries again; no need to hurry towards the same failure.
            sleep(Duration::from_secs(1)).await;
        }
    }
}
