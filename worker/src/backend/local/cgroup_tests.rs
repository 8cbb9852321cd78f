use super::*;

const V1: &str = "\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
39 31 0:36 / /sys/fs/cgroup/pids rw shared:7 - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
const V2: &str = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";
const HYBRID: &str = "\
35 31 0:32 / /sys/fs/cgroup/memory\\040x rw - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";

fn limits(cpus: Option<f64>) -> Limits {
    Limits {
        memory_bytes: 1 << 20,
        pids: 7,
        cpus,
        ..Limits::default()
    }
}

fn flat(plan: &Plan) -> Vec<String> {
    let folders = plan.folders.iter();
    folders
        .flat_map(|folder| {
            let mount = folder.mount.display();
            folder
                .writes
                .iter()
                .map(move |write| format!("{mount}/{}={}", write.file, write.value))
        })
        .collect()
}

#[test]
fn each_kind_of_host_gets_its_own_writes() {
    type Case = (
        &'static str,
        &'static str,
        &'static str,
        bool,
        Option<f64>,
        &'static [&'static str],
        &'static [Limit],
    );
    let cases: &[Case] = &[
        (
            "version 1 with swap accounting",
            V1,
            "",
            true,
            Some(0.5),
            &[
                "/sys/fs/cgroup/memory/memory.limit_in_bytes=1048576",
                "/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes=1048576",
                "/sys/fs/cgroup/pids/pids.max=7",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us=100000",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us=50000",
            ],
            &[],
        ),
        (
            "version 1, no cpu limit: no cpu folder",
            V1,
            "",
            false,
            None,
            &[
                "/sys/fs/cgroup/memory/memory.limit_in_bytes=1048576",
                "/sys/fs/cgroup/pids/pids.max=7",
            ],
            &[],
        ),
        (
            "version 2",
            V2,
            "cpuset cpu io memory hugetlb pids",
            false,
            Some(2.0),
            &[
                "/sys/fs/cgroup/memory.max=1048576",
                "/sys/fs/cgroup/memory.swap.max=0",
                "/sys/fs/cgroup/pids.max=7",
                "/sys/fs/cgroup/cpu.max=200000 100000",
            ],
            &[],
        ),
        (
            "hybrid: each controller where it is",
            HYBRID,
            "pids hugetlb",
            false,
            Some(0.000_1),
            &[
                "/sys/fs/cgroup/memory x/memory.limit_in_bytes=1048576",
                "/sys/fs/cgroup/unified/pids.max=7",
            ],
            &[Limit::Cpus],
        ),
        (
            "version 2 without delegation of memory",
            V2,
            "pids cpu",
            false,
            Some(0.000_1),
            &[
                "/sys/fs/cgroup/pids.max=7",
                "/sys/fs/cgroup/cpu.max=1000 100000",
            ],
            &[Limit::Memory],
        ),
        (
            "no cgroups at all",
            "27 1 254:0 / / rw - ext4 /dev/vda rw",
            "",
            false,
            None,
            &[],
            &[Limit::Memory, Limit::Pids],
        ),
    ];
    for (name, mountinfo, controllers, swap, cpus, writes, refused) in cases {
        let mut host = CgroupHost::parse(mountinfo, |_| (*controllers).to_owned());
        host.swap_accounting = *swap;
        let plan = plan(&host, &limits(*cpus));
        assert_eq!(flat(&plan), *writes, "{name}");
        let unenforceable: Vec<Limit> =
            plan.unenforceable.iter().map(|(limit, _)| *limit).collect();
        assert_eq!(unenforceable, *refused, "{name}");
    }
}

#[test]
fn version_2_uses_one_folder_for_all_controllers() {
    let host = CgroupHost::parse(V2, |_| "cpu memory pids".to_owned());
    let plan = plan(&host, &limits(Some(1.0)));
    assert_eq!(plan.folders.len(), 1);
    assert!(plan.folders[0].memory);
    assert_eq!(host.mounts().len(), 1);
    assert_eq!(host.controllers_on(host.mounts()[0]), Controller::ALL);
}

#[test]
fn garbage_is_skipped() {
    let host = CgroupHost::parse("\n - \nx - cgroup\n1 2 3 - cgroup2", |_| String::new());
    assert_eq!(host, CgroupHost::default());
}
