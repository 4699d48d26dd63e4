//! One controller to a data path: who has the maps, and whose programs are on an interface.

use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt as _,
    path::Path,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    maps::{Array, Map, MapData, MapInfo},
    programs::{ProgramInfo, SchedClassifier, TcAttachType},
};
use forwarder_common::layout::{LAYOUT_VERSION, Settings};
use nix::fcntl::{Flock, FlockArg};

use super::load::{SETTINGS, TC_INGRESS, maps_dir, read_settings};

/// Of a program's name the kernel keeps 15 bytes (`BPF_OBJ_NAME_LEN` with its end).
const KERNEL_NAME_LEN: usize = 15;

/// Takes the pinned maps for this process, or names the controller that has them.
pub fn lock(pin_dir: &Path) -> Result<Flock<File>> {
    fs::create_dir_all(pin_dir).with_context(|| {
        format!("cannot create {} (a BPF file system allows no dots in names)", pin_dir.display())
    })?;
    let dir = File::open(pin_dir).with_context(|| format!("cannot open {}", pin_dir.display()))?;
    Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno != nix::errno::Errno::EWOULDBLOCK {
            return anyhow!(errno).context(format!("cannot lock {}", pin_dir.display()));
        }
        anyhow!(
            "another {} has the maps in {}: stop it, or name other ones with --pin-dir",
            controller_in(pin_dir),
            pin_dir.display()
        )
    })
}

/// Who has the pins in a directory.
pub enum Holder {
    /// Nobody else, as long as this is held; nothing where there is no such directory.
    Us { _lock: Option<Flock<File>> },
    /// A controller that runs.
    Controller(String),
}

/// Takes the lock on the pins in a directory, or names the controller that has it.
pub fn holder(pin_dir: &Path) -> Holder {
    let Ok(dir) = File::open(pin_dir) else { return Holder::Us { _lock: None } };
    match Flock::lock(dir, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Holder::Us { _lock: Some(lock) },
        Err(_) => Holder::Controller(controller_in(pin_dir)),
    }
}

/// The inode number of this process's network namespace.
pub fn network_namespace() -> Result<u32> {
    let namespace = fs::metadata("/proc/self/ns/net").context("cannot look at /proc/self/ns/net")?;
    // The kernel's numbers of namespaces have 32 bits (`struct ns_common`).
    Ok(namespace.ino() as u32)
}

/// Refuses pins that belong to another network namespace: their links would be taken for those of
/// this one's interfaces.
pub fn check_namespace(pin_dir: &Path) -> Result<()> {
    if is_of_another_namespace(pin_dir)? {
        bail!(
            "the pins in {} are of another network namespace: run forwarderd there, or name other ones with --pin-dir",
            pin_dir.display()
        );
    }
    Ok(())
}

/// Whether a controller in another network namespace has made the pins.
pub fn is_of_another_namespace(pin_dir: &Path) -> Result<bool> {
    match read_settings(&maps_dir(pin_dir).join(SETTINGS)) {
        Ok(settings) if settings.layout == LAYOUT_VERSION => Ok(settings.namespace != network_namespace()?),
        _ => Ok(false),
    }
}

/// Refuses an interface that carries programs of another forwarderd, one with other pins. To be
/// called where this one has none on it.
pub fn check_interface(interface: &str) -> Result<()> {
    match of_programs(interface) {
        None => Ok(()),
        Some(controller) => bail!(
            "{interface}: programs of another {controller} are attached here: stop it, and take them off with \
             `forwarderd detach --pin-dir DIR`, where DIR has its pins"
        ),
    }
}

/// The forwarderd whose programs an interface has. Kernels before 6.6 have no TCX to ask.
pub fn of_programs(interface: &str) -> Option<String> {
    let (_, programs) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress).ok()?;
    let name = &TC_INGRESS[..KERNEL_NAME_LEN];
    let program = programs.iter().find(|program| program.name() == name.as_bytes())?;
    Some(controller_name(controller_of(program)))
}

fn controller_in(pin_dir: &Path) -> String {
    let settings = read_settings(&maps_dir(pin_dir).join(SETTINGS));
    controller_name(settings.ok().map(|settings| settings.controller))
}

fn controller_name(pid: Option<u32>) -> String {
    match pid {
        None => "forwarderd".to_owned(),
        Some(pid) if Path::new("/proc").join(pid.to_string()).exists() => format!("forwarderd (pid {pid})"),
        Some(_) => "forwarderd (not running any more)".to_owned(),
    }
}

/// The process that last filled the settings of a program.
fn controller_of(program: &ProgramInfo) -> Option<u32> {
    for id in program.map_ids().ok()?? {
        let map = MapInfo::from_id(id).ok()?;
        if map.name() == SETTINGS.as_bytes() {
            let settings: Array<_, Settings> =
                Array::try_from(Map::Array(MapData::from_id(id).ok()?)).ok()?;
            return Some(settings.get(&0, 0).ok()?.controller);
        }
    }
    None
}
