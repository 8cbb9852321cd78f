//! The system-call filter that the sidecar puts on itself and that every
//! command inherits: what a sandbox has no use for and kernels had holes in.
//!
//! A first, denying filter: what is not named is allowed. Foreign
//! architectures end the process; the x32 numbers are refused.

use std::collections::BTreeMap;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, sock_filter,
};

#[derive(Debug, thiserror::Error)]
pub(crate) enum FilterError {
    #[error("cannot build the system-call filter: {0}")]
    Build(BackendError),
    #[error("cannot install the system-call filter (a kernel with seccomp filters is needed): {0}")]
    Install(seccompiler::Error),
}

/// Builds the filter and puts it on this process. Sets no-new-privileges.
pub(crate) fn install() -> Result<(), FilterError> {
    let program = program().map_err(FilterError::Build)?;
    seccompiler::apply_filter(&program).map_err(FilterError::Install)
}

/// Refused whatever the arguments are.
const DENIED: &[i64] = &[
    // Mounts and roots.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    OPEN_TREE_ATTR,
    libc::SYS_setns,
    // Files by handle pass over every path check.
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    // Key rings are not namespaced.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Large kernel surfaces.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_fanotify_init,
    // Other processes' memory and descriptors.
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // The machine.
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_quotactl,
    libc::SYS_quotactl_fd,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_reboot,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_acct,
    libc::SYS_syslog,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// Newer than the libc crate's tables; one number on every architecture.
const OPEN_TREE_ATTR: i64 = 467;

/// The flags of clone and unshare that make a namespace.
const NAMESPACE_FLAGS: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWCGROUP,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
];
/// `CLONE_NEWTIME`, for unshare alone.
const NEW_TIME: u64 = 0x80;

/// Asks for the present personality.
const PERSONALITY_QUERY: u64 = 0xffff_ffff;
const ADDR_NO_RANDOMIZE: u64 = 0x0004_0000;
const SOCKET_TYPE_MASK: u64 = 0xf;
/// The old way to raw frames, older than its address family.
const SOCK_PACKET: u64 = 10;

fn program() -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        DENIED.iter().map(|number| (*number, Vec::new())).collect();
    let namespaces = |flags: &[i32]| -> Result<Vec<SeccompRule>, BackendError> {
        flags.iter().map(|flag| has_bits(0, *flag as u64)).collect()
    };
    let mut for_unshare = namespaces(&NAMESPACE_FLAGS)?;
    // In clone's flags this bit belongs to the exit signal.
    for_unshare.push(has_bits(0, NEW_TIME)?);
    rules.insert(libc::SYS_unshare, for_unshare);
    rules.insert(libc::SYS_clone, namespaces(&NAMESPACE_FLAGS)?);
    rules.insert(
        libc::SYS_socket,
        vec![
            none_of(
                0,
                &[
                    libc::AF_UNIX as u64,
                    libc::AF_INET as u64,
                    libc::AF_INET6 as u64,
                ],
            )?,
            masked(1, SOCKET_TYPE_MASK, libc::SOCK_RAW as u64)?,
            masked(1, SOCKET_TYPE_MASK, SOCK_PACKET)?,
        ],
    );
    rules.insert(
        libc::SYS_ioctl,
        vec![equal(1, libc::TIOCSTI)?, equal(1, libc::TIOCLINUX)?],
    );
    rules.insert(
        libc::SYS_personality,
        vec![none_of(0, &[0, ADDR_NO_RANDOMIZE, PERSONALITY_QUERY])?],
    );
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EPERM as u32),
        std::env::consts::ARCH.try_into()?,
    )?;
    let mut program = prologue();
    program.extend(BpfProgram::try_from(filter)?);
    Ok(program)
}

/// Checks that come before the filter proper. `clone3` takes its flags through
/// memory, which no filter can see: "not there" makes libraries use `clone`.
fn prologue() -> Vec<sock_filter> {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    const X32_BIT: u32 = 0x4000_0000;
    let errno = |errno: i32| libc::SECCOMP_RET_ERRNO | errno as u32;
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    vec![
        // The system call's number stands first in what a filter sees.
        step(LOAD, 0, 0, 0),
        step(AT_LEAST, 0, 1, X32_BIT),
        step(RETURN, 0, 0, errno(libc::EPERM)),
        step(EQUAL, 0, 1, libc::SYS_clone3 as u32),
        step(RETURN, 0, 0, errno(libc::ENOSYS)),
    ]
}

fn condition(argument: u8, op: SeccompCmpOp, value: u64) -> Result<SeccompCondition, BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, op, value)
}

fn equal(argument: u8, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![condition(argument, SeccompCmpOp::Eq, value)?])
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![condition(
        argument,
        SeccompCmpOp::MaskedEq(mask),
        value,
    )?])
}

fn has_bits(argument: u8, bits: u64) -> Result<SeccompRule, BackendError> {
    masked(argument, bits, bits)
}

fn none_of(argument: u8, values: &[u64]) -> Result<SeccompRule, BackendError> {
    let conditions: Result<Vec<_>, _> = values
        .iter()
        .map(|value| condition(argument, SeccompCmpOp::Ne, *value))
        .collect();
    SeccompRule::new(conditions?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fits_the_kernel() {
        let program = program().unwrap();
        assert!(program.len() < 4096, "{}", program.len());
    }
}
