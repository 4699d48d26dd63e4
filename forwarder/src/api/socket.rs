//! The unix socket: who may connect, and what becomes of one that is there already.

use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use log::info;
use nix::unistd::Group;
use tokio::net::UnixListener;

/// Members of this group may change rules.
const GROUP: &str = "forwarder";

/// The listening socket; its file goes when this is dropped.
pub struct ApiSocket {
    pub(super) listener: UnixListener,
    path: PathBuf,
    /// Which file is ours, should somebody have put another in its place.
    inode: u64,
}

impl ApiSocket {
    /// Listens at `path`, in place of a file that a dead controller has left there.
    pub fn bind(path: &Path) -> Result<Self> {
        refuse_if_taken(path)?;
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).with_context(|| {
                format!("cannot make {} for the socket (--socket names another)", directory.display())
            })?;
        }
        // Made aside and moved into place when its permissions are right, so that nobody
        // can connect before they are, and no moment is without a socket.
        let aside = path.with_added_extension("new");
        remove(&aside)?;
        let listener = UnixListener::bind(&aside).with_context(|| {
            format!("cannot listen at the socket {} (--socket names another)", path.display())
        })?;
        let inode = give_to_group(&aside)
            .and_then(|inode| fs::rename(&aside, path).map(|()| inode))
            .with_context(|| format!("cannot put the socket {} in place", path.display()))?;
        Ok(ApiSocket { listener, path: path.to_owned(), inode })
    }
}

impl Drop for ApiSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| file.ino() == self.inode) {
            // A file that stays is harmless: the next start replaces it.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn refuse_if_taken(path: &Path) -> Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Ok(file) => file.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
    };
    if !kind.is_socket() {
        bail!("{} is there and is no socket: give another --socket, or move it away", path.display());
    }
    if UnixStream::connect(path).is_ok() {
        bail!("another controller answers at {}: stop it, or give this one another --socket", path.display());
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Lets the owner and the group in, and says which inode it is.
fn give_to_group(path: &Path) -> std::io::Result<u64> {
    match Group::from_name(GROUP) {
        Ok(Some(group)) => chown(path, None, Some(group.gid.as_raw()))?,
        _ => info!("there is no group `{GROUP}`: only root may use the socket"),
    }
    fs::set_permissions(path, Permissions::from_mode(0o660))?;
    Ok(fs::symlink_metadata(path)?.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_socket_is_for_owner_and_group_and_goes_with_its_controller() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("run/forwarder.sock");
        let socket = ApiSocket::bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("forwarder.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _live = ApiSocket::bind(&path).unwrap();
        let error = ApiSocket::bind(&path).err().unwrap().to_string();
        assert!(error.contains("another controller answers"), "{error}");
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("forwarder.sock");
        fs::write(&path, "precious").unwrap();
        assert!(ApiSocket::bind(&path).is_err());
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }
}
