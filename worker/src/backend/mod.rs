//! What makes sandboxes, and the one handle through which everything else uses them.
//!
//! Both kinds speak the messages of `sidecar.proto`, so that what runs above them is the same.

mod events;
pub mod fake;
pub mod local;

use broker_schema::pool::{BackendKind, ImageRef, Limits};
use broker_schema::{Epoch, SandboxId};
use remuda_proto::v1;
use remuda_telemetry::history::{self, Event};
use remuda_telemetry::{Chain, TraceHeaders};

pub use events::Events;

use crate::sidecar_client::{CallError, SidecarClient};
use fake::{FakeBackend, FakeSandbox};
use local::{LocalError, LocalLauncher, LocalSandbox};

/// A sandbox could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error("this worker has no {backend:?} backend")]
    NoBackend { backend: BackendKind },
    #[error("the local backend cannot make sandbox {sandbox}")]
    Local {
        sandbox: SandboxId,
        #[source]
        source: LocalError,
    },
    #[error("the sidecar of sandbox {sandbox} cannot be spoken to")]
    Sidecar {
        sandbox: SandboxId,
        #[source]
        source: CallError,
    },
    #[error("the fake backend refuses sandbox {sandbox}: {reason}")]
    Fake { sandbox: SandboxId, reason: String },
}

impl CreateError {
    /// Whether this worker will never make a sandbox again.
    pub(crate) fn for_good(&self) -> bool {
        matches!(
            self,
            Self::Local {
                source: LocalError::ForkerLost,
                ..
            }
        )
    }
}

/// Something of a sandbox may be left.
#[derive(Debug, thiserror::Error)]
#[error("sandbox {sandbox} cannot be destroyed")]
pub struct DestroyError {
    sandbox: SandboxId,
    #[source]
    source: LocalError,
}

/// The backends that a worker was started with.
#[derive(Debug, Clone, Default)]
pub struct Backends {
    pub local: Option<LocalLauncher>,
    pub fake: Option<FakeBackend>,
}

impl Backends {
    pub fn get(&self, kind: BackendKind) -> Option<Backend> {
        match kind {
            BackendKind::Local => self.local.clone().map(Backend::Local),
            BackendKind::Fake => self.fake.clone().map(Backend::Fake),
        }
    }

    pub fn kinds(&self) -> Vec<BackendKind> {
        let local = self.local.as_ref().map(|_| BackendKind::Local);
        let fake = self.fake.as_ref().map(|_| BackendKind::Fake);
        local.into_iter().chain(fake).collect()
    }
}

/// One backend.
#[derive(Debug, Clone)]
pub enum Backend {
    Local(LocalLauncher),
    Fake(FakeBackend),
}

impl Backend {
    /// Makes a sandbox that answers.
    pub async fn create(
        &self,
        sandbox: SandboxId,
        image: &ImageRef,
        limits: &Limits,
    ) -> Result<Sandbox, CreateError> {
        let (inner, found) = match self {
            Self::Local(launcher) => {
                let mut made = launcher
                    .create(sandbox, image, limits)
                    .await
                    .map_err(|source| CreateError::Local { sandbox, source })?;
                match greet(&mut made).await {
                    Ok((sidecar, found)) => {
                        let sidecar = Box::new(sidecar);
                        let sandbox = made;
                        (Inner::Local { sidecar, sandbox }, found)
                    }
                    Err(source) => {
                        if let Err(error) = made.destroy().await {
                            tracing::warn!(error = %Chain(&error), %sandbox, "a sandbox is left over");
                        }
                        return Err(CreateError::Sidecar { sandbox, source });
                    }
                }
            }
            Self::Fake(backend) => {
                let fake = backend.create(sandbox, limits).await?;
                (Inner::Fake(fake), v1::HealthResponse::default())
            }
        };
        history::record(|| Event::Created {
            sandbox: sandbox.to_string(),
            processes: found.processes,
            max_epoch: found.max_epoch,
        });
        Ok(Sandbox { id: sandbox, inner })
    }
}

async fn greet(
    sandbox: &mut LocalSandbox,
) -> Result<(SidecarClient, v1::HealthResponse), CallError> {
    let socket = sandbox.take_socket().ok_or_else(|| CallError::Lost {
        call: "connect",
        reason: "its socket was taken before".into(),
    })?;
    let sidecar = SidecarClient::connect(socket).await?;
    // A sandbox is offered only once its sidecar has answered.
    let found = sidecar.health().await?;
    Ok((sidecar, found))
}

/// One isolated place that runs steps.
#[derive(Debug)]
pub struct Sandbox {
    id: SandboxId,
    inner: Inner,
}

#[derive(Debug)]
enum Inner {
    Local {
        sidecar: Box<SidecarClient>,
        sandbox: LocalSandbox,
    },
    Fake(FakeSandbox),
}

impl Sandbox {
    pub fn id(&self) -> SandboxId {
        self.id
    }

    /// The sidecar's process as this process sees it; none where there is no process.
    pub fn pid(&self) -> Option<i32> {
        match &self.inner {
            Inner::Local { sandbox, .. } => sandbox.pid(),
            Inner::Fake(_) => None,
        }
    }

    /// Starts a command. Dropping the events kills it.
    pub async fn execute(
        &self,
        request: v1::ExecuteRequest,
        trace: &TraceHeaders,
    ) -> Result<Events, CallError> {
        match &self.inner {
            Inner::Local { sidecar, .. } => {
                sidecar.execute(request, trace).await.map(Events::sidecar)
            }
            Inner::Fake(fake) => fake.execute(request).map(Events::fake),
        }
    }

    pub async fn write_file(
        &self,
        request: v1::WriteFileRequest,
        trace: &TraceHeaders,
    ) -> Result<v1::WriteFileResponse, CallError> {
        match &self.inner {
            Inner::Local { sidecar, .. } => sidecar.write_file(request, trace).await,
            Inner::Fake(fake) => fake.write_file(&request),
        }
    }

    pub async fn read_file(
        &self,
        request: v1::ReadFileRequest,
        trace: &TraceHeaders,
    ) -> Result<v1::ReadFileResponse, CallError> {
        match &self.inner {
            Inner::Local { sidecar, .. } => sidecar.read_file(request, trace).await,
            Inner::Fake(fake) => fake.read_file(&request),
        }
    }

    pub async fn signal(&self, request: v1::SignalRequest) -> Result<(), CallError> {
        match &self.inner {
            Inner::Local { sidecar, .. } => sidecar.signal(request).await,
            Inner::Fake(fake) => fake.signal(&request),
        }
    }

    /// Ends every process and, unless files are kept, empties the writable folders.
    pub async fn reset(&self, epoch: Epoch, keep_files: bool) -> Result<u32, CallError> {
        let request = v1::ResetRequest {
            epoch: epoch.0,
            keep_files,
        };
        match &self.inner {
            Inner::Local { sidecar, .. } => sidecar.reset(request).await,
            Inner::Fake(fake) => fake.reset(request),
        }
    }

    pub async fn health(&self) -> Result<v1::HealthResponse, CallError> {
        match &self.inner {
            Inner::Local { sidecar, .. } => sidecar.health().await,
            Inner::Fake(fake) => fake.health(),
        }
    }

    /// Resolves once the sandbox has ended without having been told to.
    pub async fn died(&self) {
        match &self.inner {
            Inner::Local { sandbox, .. } => sandbox.died().await,
            Inner::Fake(fake) => fake.died().await,
        }
    }

    /// How often the kernel has killed for want of memory in here; none where it does not count.
    pub fn oom_kills(&self) -> Option<u64> {
        match &self.inner {
            Inner::Local { sandbox, .. } => sandbox.oom_kills().ok(),
            Inner::Fake(fake) => Some(fake.oom_kills()),
        }
    }

    /// How often the sandbox has met its memory limit; none where nobody counts.
    pub fn limit_hits(&self) -> Option<u64> {
        match &self.inner {
            Inner::Local { sandbox, .. } => sandbox.limit_hits().ok(),
            Inner::Fake(fake) => Some(fake.limit_hits()),
        }
    }

    /// Whether its memory was used up at some time since the peak was reset; none where nobody
    /// knows.
    pub fn memory_was_full(&self) -> Option<bool> {
        match &self.inner {
            Inner::Local { sandbox, .. } => sandbox.memory_was_full().ok(),
            Inner::Fake(_) => Some(false),
        }
    }

    /// Most bytes of memory that everything in here held; none where nobody counts.
    pub fn memory_peak(&self) -> Option<u64> {
        match &self.inner {
            Inner::Local { sandbox, .. } => sandbox.memory_peak().ok(),
            Inner::Fake(_) => None,
        }
    }

    pub fn reset_memory_peak(&self) {
        match &self.inner {
            Inner::Local { sandbox, .. } => {
                // Without it the next task is told the peak of those before, which is no less true.
                let _ = sandbox.reset_memory_peak();
            }
            Inner::Fake(_) => {}
        }
    }

    /// Ends everything in it and takes back what it held.
    pub async fn destroy(self) -> Result<(), DestroyError> {
        let destroyed = match self.inner {
            Inner::Local { sandbox, .. } => {
                sandbox.destroy().await.map_err(|source| DestroyError {
                    sandbox: self.id,
                    source,
                })
            }
            Inner::Fake(fake) => {
                drop(fake);
                Ok(())
            }
        };
        history::record(|| Event::Destroyed {
            sandbox: self.id.to_string(),
            clean: destroyed.is_ok(),
        });
        destroyed
    }
}
