//! `devices` and `doctor` on hosts that are made up, on this one, and on trees that are hostile.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use crate::support::{Process, command, run, until};

/// A made-up host.
struct Host(TempDir);

impl Host {
    fn new() -> Self {
        let host = Self(tempfile::tempdir().unwrap());
        host.file("proc/sys/kernel/osrelease", "6.12.1-made-up\n");
        host.file("sys/module/vfio/refcnt", "0\n");
        host.file("dev/vfio/vfio", "");
        host
    }

    fn top(&self) -> &Path {
        self.0.path()
    }

    fn file(&self, path: &str, content: impl AsRef<[u8]>) {
        let path = self.top().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    fn link(&self, path: &str, to: &str) {
        let path = self.top().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(to, path).unwrap();
    }

    /// A PCI function; a driver or a group only where given.
    fn function(&self, address: &str, driver: Option<&str>, group: Option<u32>) -> String {
        let dir = format!("sys/bus/pci/devices/{address}");
        self.file(&format!("{dir}/vendor"), "0x15b3\n");
        self.file(&format!("{dir}/device"), "0x101e\n");
        self.file(&format!("{dir}/modalias"), "pci:v000015B3d0000101Esv000015B3sd00000001bc02sc00i00\n");
        if let Some(driver) = driver {
            self.link(&format!("{dir}/driver"), &format!("../../../bus/pci/drivers/{driver}"));
        }
        if let Some(group) = group {
            self.link(&format!("{dir}/iommu_group"), &format!("../../../kernel/iommu_groups/{group}"));
            let member = format!("sys/kernel/iommu_groups/{group}/devices/{address}");
            self.link(&member, &format!("../../../../bus/pci/devices/{address}"));
        }
        dir
    }

    /// A function bound to a variant driver, openable, with nothing against it.
    fn good(&self) -> String {
        let dir = self.function("0000:01:00.1", Some("mlx5_vfio_pci"), Some(7));
        self.file(&format!("{dir}/vfio-dev/vfio0/dev"), "511:0\n");
        self.file("dev/vfio/7", "");
        self.file("dev/vfio/devices/vfio0", "");
        dir
    }

    fn variant(&self) {
        let alias = "alias vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i* mlx5_vfio_pci\n";
        self.file("lib/modules/6.12.1-made-up/modules.alias", alias);
    }

    fn json(&self, arguments: &[&str]) -> (i32, Value) {
        let top = self.top().display().to_string();
        let output = run(&[arguments, &["--json", "--root", &top]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        let value =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {stderr}"));
        (output.status.code().unwrap(), value)
    }

    fn devices(&self) -> Vec<Value> {
        let (exit, report) = self.json(&["devices", "--all"]);
        assert_eq!(exit, 0, "{report}");
        report["devices"].as_array().unwrap().clone()
    }

    /// Codes that speak against the only device.
    fn codes(&self) -> Vec<String> {
        let devices = self.devices();
        assert_eq!(devices.len(), 1, "{devices:?}");
        let expected = if devices[0]["why-not"] == serde_json::json!([]) { "unknown" } else { "no" };
        assert_eq!(devices[0]["migration"], expected, "{devices:?}");
        codes(&devices[0])
    }

    fn check(&self, id: &str) -> Value {
        let (_, report) = self.json(&["doctor"]);
        check(&report, id)
    }
}

fn check(report: &Value, id: &str) -> Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["id"] == id).unwrap_or_else(|| panic!("no check {id}: {report}")).clone()
}

fn codes(device: &Value) -> Vec<String> {
    let why = device["why-not"].as_array().unwrap();
    why.iter().map(|reason| reason["code"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_bound_function_with_nothing_against_it_is_unknown_and_described() {
    let host = Host::new();
    let dir = host.good();
    let mut config = vec![0u8; 256];
    (config[0x06], config[0x34], config[0x3d]) = (0x10, 0x40, 1);
    config[0x40..0x44].copy_from_slice(&[0x11, 0, 7, 0]);
    host.file(&format!("{dir}/config"), config);
    let devices = host.devices();
    let device = &devices[0];
    assert_eq!(codes(device), Vec::<String>::new());
    assert_eq!(device["migration"], "unknown");
    assert_eq!((&device["id"], &device["driver"]), (&"15b3:101e".into(), &"mlx5_vfio_pci".into()));
    assert_eq!(device["iommu-group"], 7);
    assert_eq!(device["interrupts"], serde_json::json!({"intx": 1, "msi": 0, "msix": 8}));
    assert!(device["cdev"].as_str().unwrap().ends_with("dev/vfio/devices/vfio0"), "{device}");
    assert!(device["group"].as_str().unwrap().ends_with("dev/vfio/7"), "{device}");
    let files = |device: &Value| {
        let files = device["files"].as_array().unwrap().clone();
        let end = |file: &Value| file["path"].as_str().unwrap().split("/dev/").last().unwrap().to_owned();
        files.iter().map(|file| (end(file), file["refusal"].is_null())).collect::<Vec<_>>()
    };
    assert_eq!(files(device), [("vfio/7".into(), true), ("vfio/vfio".into(), true)]);
    host.file("dev/iommu", "");
    assert_eq!(files(&host.devices()[0]), [("vfio/devices/vfio0".into(), true), ("iommu".into(), true)]);
}

#[test]
fn each_reason_has_its_code_and_the_commands_that_change_it() {
    let host = Host::new();
    host.variant();
    host.function("0000:01:00.1", None, Some(7));
    assert_eq!(host.codes(), ["unbound"]);
    std::fs::remove_dir_all(host.top().join("lib/modules")).unwrap();
    let plain = host.devices()[0]["why-not"][0].to_string();
    assert!(plain.contains("modprobe vfio-pci") && plain.contains("cannot migrate"), "{plain}");
    host.variant();
    let commands = &host.devices()[0]["why-not"][0]["commands"];
    assert_eq!(
        commands,
        &serde_json::json!([
            "modprobe mlx5_vfio_pci",
            "echo mlx5_vfio_pci > /sys/bus/pci/devices/0000:01:00.1/driver_override",
            "echo 0000:01:00.1 > /sys/bus/pci/drivers_probe"
        ])
    );

    let host = Host::new();
    host.variant();
    host.function("0000:01:00.1", Some("mlx5_core"), None);
    assert_eq!(host.codes(), ["no-iommu-group", "host-driver"]);
    let commands = host.devices()[0]["why-not"][1]["commands"].to_string();
    assert!(commands.contains("0000:01:00.1/driver/unbind"), "{commands}");

    let host = Host::new();
    std::fs::remove_dir_all(host.top().join("sys/module")).unwrap();
    host.function("0000:01:00.1", None, Some(7));
    assert_eq!(host.codes(), ["no-vfio", "unbound"]);
    assert!(host.devices()[0].to_string().contains("modprobe vfio-pci"));
    host.file("boot/config-6.12.1-made-up", "CONFIG_KVM=y\n");
    assert_eq!(host.codes(), ["no-vfio", "unbound"]);
    assert!(!host.devices()[0].to_string().contains("modprobe"), "nothing to load");

    let host = Host::new();
    let dir = host.function("0000:01:00.0", Some("mlx5_core"), Some(7));
    host.file(&format!("{dir}/sriov_totalvfs"), "8\n");
    host.file(&format!("{dir}/sriov_numvfs"), "0\n");
    assert_eq!(host.codes(), ["physical-function"]);

    let host = Host::new();
    host.function("0000:01:00.1", Some("vfio-pci"), Some(7));
    assert_eq!(host.codes(), ["no-migration-in-driver", "no-device-file"]);

    let host = Host::new();
    let dir = host.good();
    std::fs::remove_file(host.top().join("dev/vfio/7")).unwrap();
    std::fs::remove_file(host.top().join("dev/vfio/devices/vfio0")).unwrap();
    assert_eq!(host.codes(), ["no-device-file"]);
    host.file("dev/vfio/devices/vfio0", "");
    assert_eq!(host.codes(), ["no-device-file"]);
    assert!(host.devices()[0].to_string().contains("modprobe iommufd"), "a file that is of no use");
    std::fs::remove_file(host.top().join("dev/vfio/devices/vfio0")).unwrap();
    host.file("dev/vfio/noiommu-7", "");
    assert_eq!(host.codes(), ["no-iommu"]);

    std::fs::remove_file(host.top().join(dir).join("vendor")).unwrap();
    assert_eq!(host.codes(), ["unreadable"]);
}

#[test]
fn a_group_with_a_stranger_and_one_with_a_bridge() {
    let host = Host::new();
    host.good();
    host.function("0000:01:00.2", Some("pcieport"), Some(7));
    assert_eq!(codes(&host.devices()[0]), Vec::<String>::new());
    host.function("0000:01:00.3", Some("nvme"), Some(7));
    let devices = host.devices();
    assert_eq!(codes(&devices[0]), ["group-not-viable"]);
    let text = devices[0]["why-not"][0]["text"].as_str().unwrap();
    assert!(text.contains("0000:01:00.3 (nvme)") && !text.contains("pcieport"), "{text}");
}

#[test]
fn a_device_that_somebody_has_open_names_who() {
    let host = Host::new();
    host.good();
    host.file("proc/41/comm", "qemu\n");
    host.link("proc/41/fd/9", &host.top().join("dev/vfio/70").display().to_string());
    assert_eq!(host.codes(), Vec::<String>::new(), "another group's file");
    host.link("proc/41/fd/10", &host.top().join("dev/vfio/7").display().to_string());
    assert_eq!(host.codes(), ["in-use"]);
    let device = &host.devices()[0];
    assert_eq!(device["users"], serde_json::json!([{"pid": 41, "command": "qemu"}]));
    let text = |device: &Value| device["why-not"][0]["text"].as_str().unwrap().to_owned();
    assert_eq!(text(device), "process 41 (qemu) has it, or its group, open");
    // Each has to be ended: all are named.
    for pid in 42..52 {
        host.file(&format!("proc/{pid}/comm"), "dpdk\n");
        host.link(&format!("proc/{pid}/fd/3"), &host.top().join("dev/vfio/7").display().to_string());
    }
    let text = text(&host.devices()[0]);
    assert!((42..52).all(|pid| text.contains(&format!("{pid} (dpdk)"))), "{text}");
}

#[test]
fn files_that_the_caller_may_not_open_are_said() {
    let host = Host::new();
    host.good();
    let top = host.top().display().to_string();
    for path in ["dev/vfio/7", "dev/vfio/devices/vfio0"] {
        std::fs::set_permissions(host.top().join(path), PermissionsExt::from_mode(0o000)).unwrap();
    }
    std::fs::set_permissions(host.top(), PermissionsExt::from_mode(0o755)).unwrap();
    let mut asked = command(&["devices", "--all", "--json", "--root", &top]);
    if rustix::process::geteuid().is_root() {
        // Root may open everything; a copy, since the build's folder may be closed to others.
        let copy = host.top().join("vfio-migrate");
        std::fs::copy(env!("CARGO_BIN_EXE_vfio-migrate"), &copy).unwrap();
        asked = std::process::Command::new(copy);
        asked.args(["devices", "--all", "--json", "--root", &top]).uid(65534).gid(65534);
    }
    let output = asked.output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(codes(&report["devices"][0]), ["no-permission"], "{report}");
    let commands = report["devices"][0]["why-not"][0]["commands"].to_string();
    assert!(commands.contains("setfacl"), "{commands}");
}

#[test]
fn mdevs_and_devices_of_other_buses_are_listed() {
    let host = Host::new();
    let uuid = "83b8f4f2-509f-382f-3c1e-e6bfe0fa1001";
    let real = format!("sys/devices/virtual/mtty/mtty/{uuid}");
    host.file(&format!("{real}/vfio-dev/vfio3/dev"), "511:3\n");
    host.link(&format!("{real}/driver"), "../../../../../bus/mdev/drivers/mtty");
    host.link(&format!("{real}/iommu_group"), "../../../../../kernel/iommu_groups/9");
    host.link(
        &format!("sys/kernel/iommu_groups/9/devices/{uuid}"),
        &format!("../../../../devices/virtual/mtty/mtty/{uuid}"),
    );
    host.link(&format!("sys/bus/mdev/devices/{uuid}"), &format!("../../../devices/virtual/mtty/mtty/{uuid}"));
    host.file("dev/vfio/devices/vfio3", "");
    host.file("dev/iommu", "");
    host.file("sys/devices/platform/thing/vfio-dev/vfio4/dev", "511:4\n");
    host.link("sys/devices/platform/thing/vfio-dev/vfio4/device", "../../../thing");
    host.link("sys/class/vfio-dev/vfio4", "../../devices/platform/thing/vfio-dev/vfio4");
    let devices = host.devices();
    let names: Vec<_> = devices.iter().map(|device| (&device["kind"], &device["name"])).collect();
    assert_eq!(names, [(&"mdev".into(), &uuid.into()), (&"other".into(), &"thing".into())]);
    assert_eq!(devices[0]["parent"], "mtty");
    assert_eq!(codes(&devices[0]), Vec::<String>::new());
}

#[test]
fn a_member_of_a_group_is_vfio_by_what_the_kernel_made_for_it() {
    let host = Host::new();
    host.good();
    let other = host.function("0000:01:00.2", Some("vendor-own"), Some(7));
    assert_eq!(codes(&host.devices()[0]), ["group-not-viable"]);
    host.file(&format!("{other}/vfio-dev/vfio1/dev"), "511:1\n");
    assert_eq!(codes(&host.devices()[0]), Vec::<String>::new());
}

#[test]
fn devices_are_chosen_by_name_and_a_made_up_one_that_is_opened_says_why_it_cannot_be() {
    let host = Host::new();
    host.good();
    host.function("0000:02:00.0", Some("nvme"), Some(8));
    let named = |more: &[&str]| {
        let (exit, report) = host.json(&[&["devices"], more].concat());
        let names: Vec<String> = report["devices"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|device| device["name"].as_str().unwrap().to_owned())
            .collect();
        (exit, names)
    };
    assert_eq!(named(&["01:00.1"]), (0, vec!["0000:01:00.1".into()]));
    assert_eq!(named(&["0000:02:00.0"]), (0, vec!["0000:02:00.0".into()]));
    let cdev = host.top().join("dev/vfio/devices/vfio0").display().to_string();
    assert_eq!(named(&[&cdev]), (0, vec!["0000:01:00.1".into()]));
    let group = host.top().join("dev/vfio/7").display().to_string();
    assert_eq!(named(&[&format!("{group}:01:00.1")]), (0, vec!["0000:01:00.1".into()]));
    assert_eq!(named(&["83b8f4f2-509f-382f-3c1e-e6bfe0fa1001"]), (1, vec![]));
    assert_eq!(named(&["0000:03:00.0"]), (1, vec![]));

    let probed = |name: &str| {
        let (exit, report) = host.json(&["devices", name, "--probe"]);
        assert_eq!(exit, 0, "{report}");
        report["devices"][0].clone()
    };
    let device = probed("01:00.1");
    assert_eq!(codes(&device), ["open-failed"], "its files are no devices: {device}");
    assert_eq!((&device["probed"], &device["flags"]), (&false.into(), &Value::Null), "{device}");
    assert_eq!(codes(&probed("02:00.0")), ["host-driver"], "not opened, what VFIO does not have");
    host.link("proc/41/fd/10", &group);
    assert_eq!(codes(&probed("01:00.1")), ["in-use"], "not opened");
}

#[test]
fn hostile_trees_are_survived() {
    let host = Host::new();
    let dir = host.good();
    host.link("sys/bus/pci/devices/0000:02:00.0", "0000:02:00.0");
    host.file("sys/bus/pci/devices/nonsense; reboot/vendor", "0x1\n");
    host.file(&format!("{dir}/class"), vec![b'x'; 1 << 20]);
    host.file(&format!("{dir}/config"), [0xff; 64]);
    host.file(&format!("{dir}/device"), [0u8, 0xff, 0xfe]);
    host.file(&format!("{dir}/vfio-dev/\u{1b}[2J/dev"), "");
    std::fs::remove_file(host.top().join(&dir).join("modalias")).unwrap();
    let pipe = host.top().join(&dir).join("modalias");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    host.file("proc/config.gz", [&[0x1f, 0x8b, 8][..], &[0xff; 64]].concat());
    host.link("boot/config-6.12.1-made-up", "config-6.12.1-made-up");
    let devices = host.devices();
    assert_eq!(devices.len(), 2, "{devices:?}");
    assert_eq!(devices[0]["id"], Value::Null);
    assert_eq!(codes(&devices[1]), ["unreadable"], "a link to itself");
    assert_eq!(host.check("kernel-config")["status"], "unknown");
    let top = host.top().display().to_string();
    let output = run(&["devices", "--root", &top]);
    assert_eq!(output.status.code(), Some(0));
    assert!(!output.stdout.contains(&0x1b), "no control character reaches a terminal");
}

#[test]
fn a_vfio_user_server_is_asked_and_one_that_is_none_is_said() {
    let host = Host::new();
    let socket = host.top().join("d.sock");
    let path = socket.display().to_string();
    let _server = Process::start(&["device", "--socket", &path, "--state-size", "4M"]);
    until("the server's socket", || socket.exists().then_some(()));
    let asked = |more: &[&str]| {
        let (exit, report) = host.json(&[&["devices"], more].concat());
        assert_eq!(exit, 0, "{report}");
        report["devices"].as_array().unwrap().last().unwrap().clone()
    };
    let device = until("the server to listen", || {
        let device = asked(&[&path]);
        (device["migration"] == "yes").then_some(device)
    });
    assert_eq!(device["flags"], serde_json::json!(["STOP_COPY", "P2P", "PRE_COPY"]), "{device}");
    assert_eq!(device["dirty-tracking"], "device-log", "{device}");
    assert!(device["stop-copy-size"].as_u64().unwrap() >= 4 << 20, "{device}");
    let nobody = asked(&["/nonexistent/d.sock"]);
    assert_eq!(codes(&nobody), ["no-answer"], "{nobody}");
}

#[test]
fn doctor_tells_a_host_that_can_from_one_that_cannot() {
    let host = Host::new();
    host.file("sys/kernel/iommu_groups/7/type", "DMA\n");
    host.file(
        "boot/config-6.12.1-made-up",
        "CONFIG_VFIO=m\n# CONFIG_IOMMUFD is not set\nCONFIG_MLX5_VFIO_PCI=m\n",
    );
    let (exit, report) = host.json(&["doctor"]);
    assert_eq!((exit, &report["kernel-devices"]), (0, &true.into()), "{report}");
    assert_eq!(check(&report, "config-iommufd")["status"], "warn");
    assert_eq!(check(&report, "config-variant-drivers")["found"], "MLX5_VFIO_PCI");
    assert_eq!(check(&report, "vfio")["status"], "ok");
    assert_eq!(check(&report, "vfio")["fix"], Value::Null);

    type Break = fn(&Host);
    let broken: [(&str, Break); 4] = [
        ("dev-vfio", |host| std::fs::remove_file(host.top().join("dev/vfio/vfio")).unwrap()),
        ("kernel-version", |host| host.file("proc/sys/kernel/osrelease", "5.10.0\n")),
        ("vfio", |host| {
            std::fs::remove_dir_all(host.top().join("sys/module")).unwrap();
            host.file("boot/config-6.12.1-made-up", "CONFIG_KVM=y\n");
        }),
        ("iommu-groups", |host| std::fs::remove_dir_all(host.top().join("sys/kernel/iommu_groups")).unwrap()),
    ];
    for (id, break_it) in broken {
        let host = Host::new();
        host.file("sys/kernel/iommu_groups/7/type", "DMA\n");
        break_it(&host);
        let (exit, report) = host.json(&["doctor"]);
        assert_eq!((exit, &report["kernel-devices"]), (1, &false.into()), "{id}: {report}");
        let check = check(&report, id);
        assert_eq!(check["status"], "missing", "{check}");
        assert!(check["fix"].is_string(), "{check}");
    }
}

#[test]
fn locked_memory_is_held_against_the_guest_or_the_host() {
    let host = Host::new();
    host.file("proc/self/status", "Name:\tx\nCapEff:\t0000000000000000\n");
    let limit = |bytes: &str| {
        format!("Limit  Soft Limit  Hard Limit  Units\nMax locked memory  {bytes}  {bytes}  bytes\n")
    };
    host.file("proc/self/limits", limit("8388608"));
    let memlock = |more: &[&str]| {
        let (_, report) = host.json(&[&["doctor"], more].concat());
        let check = check(&report, "memlock");
        (check["status"].as_str().unwrap().to_owned(), check["fix"].as_str().unwrap_or_default().to_owned())
    };
    assert_eq!(memlock(&[]).0, "warn", "of a host that is not known");
    host.file("proc/meminfo", "MemTotal:       4096 kB\n");
    assert_eq!(memlock(&[]), ("ok".into(), String::new()));
    host.file("proc/meminfo", "MemTotal:       16777216 kB\n");
    let (status, fix) = memlock(&[]);
    assert!(status == "warn" && fix.contains("unlimited"), "{status}: {fix}");
    assert_eq!(memlock(&["--memory", "8M"]).0, "ok");
    let (status, fix) = memlock(&["--memory", "9M"]);
    assert!(status == "missing" && fix.contains("ulimit -l 9216"), "{status}: {fix}");
    host.file("proc/self/status", "Name:\tx\nCapEff:\t0000000000004000\n");
    assert_eq!(memlock(&["--memory", "9M"]).0, "ok", "CAP_IPC_LOCK");
    host.file("proc/self/uid_map", "         0     100000      65536\n");
    assert_eq!(
        memlock(&["--memory", "9M"]).0,
        "missing",
        "in a user namespace of its own it counts for nothing"
    );
    host.file("proc/self/limits", limit("unlimited"));
    assert_eq!(memlock(&["--memory", "9M"]).0, "ok");
}

#[test]
fn what_is_loaded_is_there_whatever_the_configuration_says() {
    let host = Host::new();
    host.file("boot/config-6.12.1-made-up", "CONFIG_VFIO=m\n# CONFIG_IOMMUFD is not set\n");
    let iommufd = host.check("config-iommufd");
    assert_eq!(iommufd["status"], "warn", "{iommufd}");
    let file = host.check("dev-iommu");
    assert!(file["fix"].as_str().unwrap().contains("this one has none"), "{file}");
    host.file("sys/module/iommufd/refcnt", "0\n");
    assert_eq!(host.check("config-iommufd")["status"], "ok");
    std::fs::remove_dir_all(host.top().join("boot")).unwrap();
    assert_eq!(host.check("config-iommufd")["status"], "ok");
    std::fs::remove_dir_all(host.top().join("sys/module/iommufd")).unwrap();
    assert_eq!(host.check("config-iommufd")["status"], "unknown");
}

#[test]
fn this_host_is_answered_for_too() {
    for arguments in [
        &["devices"][..],
        &["devices", "--all"],
        &["doctor"],
        &["devices", "--all", "--json"],
        &["doctor", "--json"],
    ] {
        let output = run(arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(matches!(output.status.code(), Some(0 | 1)), "{arguments:?}: {stderr}");
        assert!(!output.stdout.is_empty() && !stderr.contains("panicked"), "{arguments:?}: {stderr}");
    }
    // Each answer is what this host's own files say, and whatever is missing has what fixes it.
    let output = run(&["doctor", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let missing = report["checks"].as_array().unwrap().iter().filter(|check| check["status"] == "missing");
    let missing: Vec<_> = missing.collect();
    assert!(missing.iter().all(|check| check["fix"].is_string()), "{missing:?}");
    assert_eq!(report["kernel-devices"], missing.is_empty());
    assert_eq!(output.status.code(), Some(i32::from(!missing.is_empty())));
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    assert_eq!(report["kernel"], release.trim());
    let vfio = Path::new("/sys/module/vfio").is_dir();
    if !vfio && !std::fs::read_to_string("/proc/modules").unwrap_or_default().contains("\nvfio ") {
        assert_ne!(check(&report, "vfio")["found"], "loaded");
    }
    for (id, path) in [("dev-vfio", "/dev/vfio/vfio"), ("dev-iommu", "/dev/iommu")] {
        let there = Path::new(path).exists();
        assert_eq!(check(&report, id)["found"] == format!("there is no {path}"), !there, "{report}");
    }
    let gone = run(&["devices", "0000:ff:1f.7", "--probe"]);
    if !Path::new("/sys/bus/pci/devices/0000:ff:1f.7").exists() {
        assert_eq!(gone.status.code(), Some(1));
        assert!(String::from_utf8_lossy(&gone.stderr).contains("there is no device"));
    }
}

#[test]
fn a_device_is_described_without_being_opened() {
    let host = Host::new();
    let dir = host.good();
    for (file, text) in [
        ("subsystem_vendor", "0x15b3\n"),
        ("subsystem_device", "0x0001\n"),
        ("revision", "0x02\n"),
        ("class", "0x020000\n"),
        ("resource", "0x00000000f0000000 0x00000000f0003fff 0x0000000000040200\n0x0 0x0 0x0\n"),
        ("infiniband/mlx5_2/fw_ver", "22.41.1000\n"),
    ] {
        host.file(&format!("{dir}/{file}"), text);
    }
    let mut config = vec![0u8; 256];
    (config[0x06], config[0x34], config[0x3d]) = (0x10, 0x40, 0);
    config[0x40..0x44].copy_from_slice(&[0x11, 0x00, 0x03, 0x00]);
    host.file(&format!("{dir}/config"), &config);
    let mut vpd = vec![0x90, 12, 0];
    vpd.extend(b"PN\x04PART");
    vpd.extend(b"EC\x02A1\x78");
    host.file(&format!("{dir}/vpd"), &vpd);
    let top = host.top().display().to_string();
    let output = run(&["describe", "vfio:0000:01:00.1", "--name", "net0", "--root", &top]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{stderr}"));
    let wanted = serde_json::json!({
        "id": "net0", "backend": "kernel", "kernel": "6.12.1-made-up", "firmware": "22.41.1000", "model": null, "flags": null,
        "facts": {"vpd_part": "PART", "vpd_change": "A1"}, "irqs": {"2": 4},
    });
    for (field, value) in wanted.as_object().unwrap() {
        assert_eq!(&manifest[field], value, "{field}: {manifest}");
    }
    assert_eq!(manifest["driver"]["name"], "mlx5_vfio_pci");
    assert_eq!((&manifest["pci"]["revision"], &manifest["regions"][0]["size"]), (&2.into(), &0x4000.into()));
    assert_eq!(manifest["capabilities"][0]["id"], 0x11);

    // Without root only the head of config space can be read: then what follows is not known.
    host.file(&format!("{dir}/config"), &config[..64]);
    let output = run(&["describe", "vfio:0000:01:00.1", "--root", &top]);
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&manifest["capabilities"], &manifest["id"]), (&Value::Null, &"0000-01-00.1".into()));
    let output = run(&["describe", "--host", "--root", &top]);
    let whole: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(whole["devices"][0]["id"], "0000-01-00.1");
    let output = run(&["describe", "vfio:0000:09:00.0", "--root", &top]);
    assert!(!output.status.success() && String::from_utf8_lossy(&output.stderr).contains("has no device"));
}
