//! The stages of going down, and the channel that announces them.

use tokio::sync::watch;

/// How far the server is on its way down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ShutdownStage {
    /// Serving.
    Running,
    /// New requests are refused; running ones may finish within [`crate::ServerOptions::drain`].
    Drain,
    /// Everything ends at once.
    Now,
}

/// Moves the server on its way down; held by whoever hears the operating system's signals.
#[derive(Debug)]
pub struct ShutdownTrigger {
    stage: watch::Sender<ShutdownStage>,
}

/// Tells the server how far it is on its way down.
#[derive(Clone, Debug)]
pub struct ShutdownSignal {
    stage: watch::Receiver<ShutdownStage>,
    /// How many [`Hold`]s there are.
    holds: watch::Sender<usize>,
}

/// What outlives its connection's request, and is waited for as a request is. Dropped, it is over.
#[derive(Debug)]
pub(crate) struct Hold {
    holds: watch::Sender<usize>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.holds.send_modify(|holds| *holds -= 1);
    }
}

/// A connected trigger and signal, in stage [`ShutdownStage::Running`]. If the trigger is dropped, the stage stays.
pub fn shutdown_channel() -> (ShutdownTrigger, ShutdownSignal) {
    let (sender, receiver) = watch::channel(ShutdownStage::Running);
    (ShutdownTrigger { stage: sender }, ShutdownSignal { stage: receiver, holds: watch::Sender::new(0) })
}

impl ShutdownTrigger {
    /// Goes one stage further: call it once per signal. The first drains, the second ends at once.
    pub fn advance(&self) {
        self.stage.send_modify(|stage| {
            *stage = match stage {
                ShutdownStage::Running => ShutdownStage::Drain,
                ShutdownStage::Drain | ShutdownStage::Now => ShutdownStage::Now,
            }
        });
    }
}

impl ShutdownSignal {
    /// The stage now.
    pub fn stage(&self) -> ShutdownStage {
        *self.stage.borrow()
    }

    pub(crate) fn hold(&self) -> Hold {
        self.holds.send_modify(|holds| *holds += 1);
        Hold { holds: self.holds.clone() }
    }

    /// Waits until there is no [`Hold`].
    pub(crate) async fn released(&self) {
        let mut holds = self.holds.subscribe();
        // The sender is here, so this cannot fail.
        drop(holds.wait_for(|holds| *holds == 0).await);
    }

    /// Waits until the stage is reached or passed; for ever if the trigger is dropped before.
    pub async fn reached(&self, stage: ShutdownStage) {
        let mut receiver = self.stage.clone();
        if receiver.wait_for(|now| *now >= stage).await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_signal_goes_one_stage_further() {
        let (trigger, signal) = shutdown_channel();
        assert_eq!(signal.stage(), ShutdownStage::Running);
        trigger.advance();
        assert_eq!(signal.stage(), ShutdownStage::Drain);
        signal.reached(ShutdownStage::Drain).await;
        trigger.advance();
        trigger.advance();
        assert_eq!(signal.stage(), ShutdownStage::Now);
        signal.reached(ShutdownStage::Drain).await;
        signal.reached(ShutdownStage::Now).await;
    }
}
