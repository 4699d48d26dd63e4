//! One controller to a data path: who has the maps, and whose programs are on an interface.

use std::{
    fs::{self, File},
    path::Path,
};

use anyhow::{Context as _, Result, anyhow, bail};
use aya::{
    maps::{Array, Map, MapData, MapInfo},
    programs::{ProgramInfo, SchedClassifier, TcAttachType},
};
use forwarder_common::layout::Settings;
use nix::fcntl::{Flock, FlockArg};

use super::load::{TC_INGRESS, maps_dir, read_settings};

/// Of a program's name the kernel keeps 15 bytes (`BPF_OBJ_NAME_LEN` with its end).
const KERNEL_NAME_LEN: usize = 15;

/// Takes the pinned maps for this process, or names the controller that has them.
pub fn lock(pin_dir: &Path) -> Result<Flock<File>> {
    fs::create_dir_all(pin_dir).with_context(|| format!("cannot create {}", pin_dir.display()))?;
    let dir = File::open(pin_dir).with_context(|| format!("cannot open {}", pin_dir.display()))?;
    Flock::lock(dir, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        if errno != nix::errno::Errno::EWOULDBLOCK {
            return anyhow!(errno).context(format!("cannot lock {}", pin_dir.display()));
        }
        let first = read_settings(&maps_dir(pin_dir).join("SETTINGS")).map(|settings| settings.controller);
        anyhow!(
            "another forwarderd{} has the maps in {}: stop it, or name other ones with --pin-dir",
            first.map_or_else(|_| String::new(), |pid| format!(" (pid {pid})")),
            pin_dir.display()
        )
    })
}

/// Refuses an interface that carries programs of another forwarderd, one with other pins. To be
/// called where this one has none on it.
pub fn check_interface(interface: &str) -> Result<()> {
    // Kernels before 6.6 have no TCX to ask.
    let Ok((_, programs)) = SchedClassifier::query_tcx(interface, TcAttachType::Ingress) else {
        return Ok(());
    };
    let name = &TC_INGRESS[..KERNEL_NAME_LEN];
    let Some(program) = programs.iter().find(|program| program.name() == name.as_bytes()) else {
        return Ok(());
    };
    bail!(
        "{interface}: programs of another forwarderd{} are attached here: stop it, and take them off with \
         `forwarderd detach --pin-dir` and its pins",
        controller_of(program).map_or_else(String::new, |pid| format!(" (pid {pid})")),
    )
}

/// The process that last filled the settings of a program.
fn controller_of(program: &ProgramInfo) -> Option<u32> {
    for id in program.map_ids().ok()?? {
        let map = MapInfo::from_id(id).ok()?;
        if map.name() == b"SETTINGS" {
            let settings: Array<_, Settings> =
                Array::try_from(Map::Array(MapData::from_id(id).ok()?)).ok()?;
            return Some(settings.get(&0, 0).ok()?.controller);
        }
    }
    None
}
