//! The `/etc` of sandboxes made from the host: an allow-list of what programs need to run, copied
//! once, and a few files of our own. Nothing that is not readable by everybody is ever copied.

use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

/// Copied when the host has them.
const ALLOWED: &[&str] = &[
    "alternatives",
    "bash.bashrc",
    "bindresvport.blacklist",
    "ca-certificates",
    "ca-certificates.conf",
    "crypto-policies",
    "debian_version",
    "fonts",
    "gai.conf",
    "host.conf",
    "inputrc",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "locale.alias",
    "locale.conf",
    "localtime",
    "lsb-release",
    "magic",
    "magic.mime",
    "mailcap",
    "mime.types",
    "networks",
    "os-release",
    "perl",
    "pki",
    "profile",
    "profile.d",
    "protocols",
    "python3",
    "R",
    "redhat-release",
    "rpc",
    "services",
    "shells",
    "ssl",
    "terminfo",
    "timezone",
    "xattr.conf",
    "xml",
];

/// Families of names that carry a version: interpreters' own configuration.
const ALLOWED_PREFIXES: &[&str] = &["java-", "python3."];

/// Never copied, at any depth of an allowed folder.
const DENIED: &[&str] = &["private", "secrets"];
const DENIED_SUFFIXES: &[&str] = &[".key", ".p12", ".pfx"];

/// Written by us, so that nothing about the host's people or network is told.
const OWN: &[(&str, &str)] = &[
    (
        "passwd",
        "root:x:0:0:root:/root:/bin/bash\n\
         sandbox:x:1000:1000:sandbox:/workspace:/bin/bash\n\
         nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    ),
    ("group", "root:x:0:\nsandbox:x:1000:\nnogroup:x:65534:\n"),
    (
        "hosts",
        "127.0.0.1\tlocalhost sandbox\n::1\tlocalhost ip6-localhost ip6-loopback\n",
    ),
    ("hostname", "sandbox\n"),
    (
        "nsswitch.conf",
        "passwd: files\ngroup: files\nhosts: files\nservices: files\nprotocols: files\n",
    ),
    ("resolv.conf", ""),
];

/// Folders nest no deeper than this in any known allowed entry.
const MAX_DEPTH: u32 = 8;

pub(crate) fn is_allowed(name: &str) -> bool {
    ALLOWED.contains(&name)
        || ALLOWED_PREFIXES
            .iter()
            .any(|prefix| name.starts_with(prefix))
}

fn is_denied(name: &str) -> bool {
    DENIED.contains(&name) || DENIED_SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
}

/// Fills the empty folder `target` from the host's `source`.
pub(crate) fn copy_clean(source: &Path, target: &Path) -> io::Result<()> {
    for entry in fs::read_dir(source)? {
        let entry = entry?;
        let name = entry.file_name();
        if name.to_str().is_some_and(is_allowed) {
            copy(&entry.path(), &target.join(&name), MAX_DEPTH)?;
        }
    }
    for (name, content) in OWN {
        fs::write(target.join(name), content)?;
    }
    symlink("/proc/self/mounts", target.join("mtab"))
}

/// Copies files, folders and links that everybody may read; skips everything else.
fn copy(source: &Path, target: &Path, depth: u32) -> io::Result<()> {
    let metadata = fs::symlink_metadata(source)?;
    let mode = metadata.permissions().mode();
    if metadata.is_symlink() {
        return symlink(fs::read_link(source)?, target);
    }
    if metadata.is_file() && mode & 0o004 != 0 {
        fs::write(target, fs::read(source)?)?;
        // Not more than the host gives everybody, and never set-id.
        return fs::set_permissions(target, fs::Permissions::from_mode(mode & 0o755));
    }
    if metadata.is_dir() && mode & 0o005 == 0o005 && depth > 0 {
        fs::create_dir(target)?;
        for entry in fs::read_dir(source)? {
            let entry = entry?;
            let name = entry.file_name();
            if !name.to_str().is_none_or(is_denied) {
                copy(&entry.path(), &target.join(&name), depth - 1)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_copied() {
        let folder = tempfile::tempdir().unwrap();
        let (source, target) = (folder.path().join("a"), folder.path().join("b"));
        fs::create_dir_all(source.join("ssl/private")).unwrap();
        fs::create_dir_all(source.join("ssl/certs")).unwrap();
        fs::create_dir_all(source.join("ssh")).unwrap();
        fs::create_dir(&target).unwrap();
        for name in [
            "shadow",
            "passwd",
            "ssl/private/a.pem",
            "ssl/certs/ca.pem",
            "ssl/certs/host.key",
            "ssh/ssh_host_rsa_key",
            "services",
            "protocols",
        ] {
            fs::write(source.join(name), "host").unwrap();
        }
        fs::set_permissions(source.join("protocols"), fs::Permissions::from_mode(0o600)).unwrap();

        copy_clean(&source, &target).unwrap();

        assert!(target.join("ssl/certs/ca.pem").exists());
        assert!(target.join("services").exists());
        for absent in [
            "shadow",
            "ssl/private",
            "ssl/certs/host.key",
            "ssh",
            "protocols",
        ] {
            assert!(!target.join(absent).exists(), "{absent} was copied");
        }
        let passwd = fs::read_to_string(target.join("passwd")).unwrap();
        assert!(!passwd.contains("host:") && passwd.contains("sandbox:x:1000"));
    }

    #[test]
    fn versioned_names_are_allowed() {
        for (name, allowed) in [
            ("python3.11", true),
            ("java-17-openjdk", true),
            ("gshadow", false),
            ("ssh", false),
            ("environment", false),
        ] {
            assert_eq!(is_allowed(name), allowed, "{name}");
        }
    }
}
