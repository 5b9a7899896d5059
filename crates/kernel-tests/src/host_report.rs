//! What `vfio-migrate devices` and `doctor` say of the machine, against what it is. Where a check holds, the truth is
//! altered, and the check has to notice.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use vfio_migration_types::{Granule, Iova, MigrationState, Range};
use vfio_migration_uapi::{
    device_info, device_state, irq_info, migration_flags, region_info, report_dma_logging, set_device_state,
    start_dma_logging, stop_copy_size, stop_dma_logging,
};

use crate::check::{Outcome, holds, same};
use crate::command::{self, PROGRAM};
use crate::edu;
use crate::instance::{Instance, Opened};
use crate::migdev;
use crate::mtty::one_port;
use crate::pci;

/// A user that owns nothing.
const NOBODY: u32 = 65534;

/// Runs the command; its exit code, and what it said.
fn report(arguments: &[&str], user: Option<u32>) -> Outcome<(i32, Value)> {
    let run = command::run_as(arguments, user)?;
    Ok((run.exit.ok_or("it was killed")?, run.report))
}

/// What `devices` says of one device.
fn device(name: &str, more: &[&str]) -> Outcome<Value> {
    device_as(name, more, None)
}

fn device_as(name: &str, more: &[&str], user: Option<u32>) -> Outcome<Value> {
    let (exit, report) = report(&[&["devices", name], more].concat(), user)?;
    same("exit code", exit, 0)?;
    let devices = report["devices"].as_array().ok_or("no devices")?;
    same("devices", devices.len(), 1)?;
    same("its name", devices[0]["name"].as_str(), Some(name))?;
    Ok(devices[0].clone())
}

fn codes(device: &Value) -> Vec<&str> {
    let why = device["why-not"].as_array().map(Vec::as_slice).unwrap_or_default();
    why.iter().filter_map(|reason| reason["code"].as_str()).collect()
}

/// Fails unless exactly these reasons speak against a device.
fn against(device: &Value, wanted: &[&str]) -> Outcome {
    let migration = if wanted.is_empty() { "unknown" } else { "no" };
    same("reasons", codes(device), wanted.to_vec()).map_err(|error| format!("{error}: {device}"))?;
    same("migration", device["migration"].as_str(), Some(migration))
}

/// Regions by index, with their size in bytes.
type Regions = Vec<(u32, u64)>;

/// A device's regions and interrupts, by the uAPI itself.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Truth {
    flags: Vec<String>,
    state: String,
    size: u64,
    interrupts: Vec<u32>,
    regions: Regions,
    tracking: String,
}

impl Truth {
    fn of(instance: &Instance) -> Outcome<Self> {
        let opened = instance.open()?;
        let device = opened.device()?;
        let flags = migration_flags(device)?;
        let names = [(true, "STOP_COPY"), (flags.p2p, "P2P"), (flags.pre_copy, "PRE_COPY")];
        let (interrupts, regions) = Self::hardware(&opened)?;
        let range = Range::new(Iova(1 << 20), 64 << 10)?;
        let granule = start_dma_logging(device, Granule::PAGE, &[range])?;
        let logs = report_dma_logging(device, range, granule, &mut [0; 1]).is_ok();
        stop_dma_logging(device)?;
        Ok(Self {
            flags: names.iter().filter(|(has, _)| *has).map(|(_, name)| (*name).into()).collect(),
            state: device_state(device)?.to_string(),
            size: stop_copy_size(device)?,
            interrupts,
            regions,
            tracking: if logs { "device-log" } else { "type1" }.into(),
        })
    }

    fn hardware(opened: &Opened) -> Outcome<(Vec<u32>, Regions)> {
        let device = opened.device()?;
        let info = device_info(device)?;
        // Some drivers refuse what the device has none of.
        let interrupts = (0..3).map(|kind| irq_info(device, kind).map_or(0, |irqs| irqs.count)).collect();
        let regions = (0..info.regions).filter_map(|index| region_info(device, index).ok());
        let regions = regions.filter(|region| region.size > 0).map(|region| (region.index, region.size));
        Ok((interrupts, regions.collect()))
    }

    /// The same, as it was reported.
    fn reported(device: &Value) -> Outcome<Self> {
        let word = |name: &str| Ok::<_, String>(device[name].as_str().ok_or(name)?.to_owned());
        let flags = device["flags"].as_array().ok_or_else(|| format!("no flags: {device}"))?;
        same("migration", device["migration"].as_str(), Some("yes"))?;
        same("reasons", codes(device), vec![])?;
        holds(device["probed"] == true, "it was opened")?;
        holds(device["dirty-tracking-why"].is_string(), "the choice is explained")?;
        Ok(Self {
            flags: flags.iter().filter_map(Value::as_str).map(Into::into).collect(),
            state: word("state")?,
            size: device["stop-copy-size"].as_u64().ok_or("no size")?,
            interrupts: interrupts(device),
            regions: regions(device),
            tracking: word("dirty-tracking")?,
        })
    }
}

fn interrupts(device: &Value) -> Vec<u32> {
    let count = |kind: &str| device["interrupts"][kind].as_u64().and_then(|count| count.try_into().ok());
    ["intx", "msi", "msix"].into_iter().filter_map(count).collect()
}

fn regions(device: &Value) -> Regions {
    let regions = device["regions"].as_array().map(Vec::as_slice).unwrap_or_default();
    let region =
        |region: &Value| Some((region["index"].as_u64()?.try_into().ok()?, region["size"].as_u64()?));
    regions.iter().filter_map(region).collect()
}

/// Without `--probe`: everything that is there, and nothing is opened.
pub(crate) fn lists_what_is_there() -> Outcome {
    let instances = [one_port()?, Instance::new("migdev", "migdev-1M")?];
    let (exit, all) = report(&["devices"], None)?;
    same("exit code", exit, 0)?;
    same("problems", all["problems"].as_array().map(Vec::len), Some(0))?;
    let listed = |uuid: &str| {
        let devices = all["devices"].as_array().map(Vec::as_slice).unwrap_or_default();
        devices.iter().find(|device| device["name"] == uuid).cloned()
    };
    for (instance, parent) in instances.iter().zip(["mtty", "migdev"]) {
        let device = listed(instance.uuid()).ok_or_else(|| format!("{parent} is not listed: {all}"))?;
        same("kind", device["kind"].as_str(), Some("mdev"))?;
        same("parent", device["parent"].as_str(), Some(parent))?;
        same("driver", device["driver"].as_str(), Some(parent))?;
        let group = instance.group()?;
        same("group", device["group"].as_str(), group.to_str())?;
        let file = instance.file().filter(|file| file.exists());
        same("its own file", device["cdev"].as_str(), file.as_deref().and_then(Path::to_str))?;
        let first = file.unwrap_or(group);
        same("opened by", device["files"][0]["path"].as_str(), first.to_str())?;
        against(&device, &[])?;
        holds(device["probed"] == false && device["flags"].is_null(), "it was not opened")?;
    }
    let uuid = instances[0].uuid().to_owned();
    drop(instances);
    let gone = Command::new(PROGRAM).args(["devices", &uuid]).stderr(Stdio::piped()).output()?;
    same("exit code for a device that is gone", gone.status.code(), Some(1))?;
    holds(String::from_utf8_lossy(&gone.stderr).contains("there is no device"), "it says that it is gone")
}

/// With it: what the uAPI says directly. A device that is then made another is told from what it was.
pub(crate) fn asks_as_the_uapi_does() -> Outcome {
    let other = Instance::new("mtty", "mtty-2")?;
    for instance in [one_port()?, migdev::small()?, Instance::new("migdev", "migdev-1M")?] {
        let truth = Truth::of(&instance)?;
        let asked = Truth::reported(&device(instance.uuid(), &["--probe"])?)?;
        same("what it says", &asked, &truth)?;
        same("its state after", Truth::of(&instance)?, truth.clone())?;
        let another = Truth::reported(&device(other.uuid(), &["--probe"])?)?;
        holds(same("another device", &another, &truth).is_err(), "another device is told from it")?;
    }
    let instance = migdev::small()?;
    let before = Truth::of(&instance)?;
    for (name, value) in [("mig_flags", 1), ("mig_flags", 3), ("state_size", 3 << 20)] {
        migdev::set(&instance, name, value)?;
        let asked = Truth::reported(&device(instance.uuid(), &["--probe"])?)?;
        holds(same("as before", &asked, &before).is_err(), &format!("{name} {value} is noticed: {asked:?}"))?;
        same(name, asked, Truth::of(&instance)?)?;
    }
    let output = Command::new(PROGRAM).args(["devices", instance.uuid(), "--probe"]).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    holds(text.contains("migration: STOP_COPY P2P\n"), &text)
}

/// A device that holds what a guest left there keeps it.
pub(crate) fn leaves_the_state_that_it_finds() -> Outcome {
    let instance = one_port()?;
    {
        let opened = instance.open()?;
        set_device_state(opened.device()?, MigrationState::Stop)?;
    }
    let asked = device(instance.uuid(), &["--probe"])?;
    same("state", asked["state"].as_str(), Some("STOP"))?;
    same("state after", device_state(instance.open()?.device()?)?, MigrationState::Stop)
}

/// A device that another process has: named, and not touched, whichever way it was opened.
pub(crate) fn leaves_alone_what_is_in_use() -> Outcome {
    let instance = one_port()?;
    let uuid = instance.uuid();
    let blind = Tree::new(&["sys", "dev"])?;
    let look = |held: BorrowedFd<'_>| -> Outcome {
        let data = set_device_state(held, MigrationState::PreCopy)?;
        for more in [&[][..], &["--probe"]] {
            let device = device(uuid, more)?;
            against(&device, &["in-use"])?;
            holds(device["probed"] == false, "it was not opened")?;
            let pid = device["users"][0]["pid"].as_u64();
            same("who has it", pid, Some(std::process::id().into()))?;
        }
        // Whoever may not see who has it hears it from the kernel.
        let unseen = device(uuid, &["--root", blind.top(), "--probe"])?;
        against(&unseen, &["in-use"])?;
        holds(unseen["probed"] == false && unseen["users"][0].is_null(), "not opened, and by nobody")?;
        same("state", device_state(held)?, MigrationState::PreCopy)?;
        drop(data);
        set_device_state(held, MigrationState::Running)?;
        Ok(())
    };
    look(instance.open()?.device()?)?;
    if instance.file().is_some_and(|file| file.exists()) {
        look(instance.open_cdev()?.device.as_fd())?;
    }
    // It was the use that stood against it.
    against(&device(uuid, &[])?, &[])?;
    Truth::reported(&device(uuid, &["--root", blind.top(), "--probe"])?).map(|_| ())
}

/// A user that owns nothing hears which files are closed to it, and may ask the device once they are open.
pub(crate) fn says_what_a_user_may_not_open() -> Outcome {
    // Or its group's file is closed too.
    let _edu = Edu::unbound()?;
    let instance = one_port()?;
    let uuid = instance.uuid();
    let device = device_as(uuid, &["--probe"], Some(NOBODY))?;
    against(&device, &["no-permission"])?;
    let files = device["files"].as_array().ok_or("no files")?;
    let closed: Vec<&str> = files
        .iter()
        .filter(|file| file["refusal"].is_string())
        .filter_map(|file| file["path"].as_str())
        .collect();
    holds(!closed.is_empty(), "files are closed to it")?;
    let commands = &device["why-not"][0]["commands"];
    let wanted: Vec<String> = closed.iter().map(|file| format!("setfacl -m u:{NOBODY}:rw {file}")).collect();
    same("commands", commands, &Value::from(wanted))?;
    let (exit, doctor) = report(&["doctor", "--memory", "512M"], Some(NOBODY))?;
    same("exit code of doctor", exit, 1)?;
    check(&doctor, "device-files", "missing")?;
    check(&doctor, "memlock", "missing")?;
    let modes: Vec<_> =
        closed.iter().map(|file| Ok((*file, fs::metadata(file)?.permissions()))).collect::<Outcome<_>>()?;
    for file in &closed {
        fs::set_permissions(file, PermissionsExt::from_mode(0o666))?;
    }
    let asked = device_as(uuid, &["--probe"], Some(NOBODY));
    let doctor = report(&["doctor", "--memory", "4K"], Some(NOBODY));
    for (file, mode) in modes {
        fs::set_permissions(file, mode)?;
    }
    same("what it says", Truth::reported(&asked?)?, Truth::of(&instance)?)?;
    let (_, doctor) = doctor?;
    check(&doctor, "device-files", "ok")?;
    check(&doctor, "memlock", "ok").map(|_| ())
}

/// edu, which no driver has: the commands that are said to bind it do.
pub(crate) fn says_how_to_bind() -> Outcome {
    let edu = Edu::unbound()?;
    let unbound = device(&edu.address, &["--probe"])?;
    against(&unbound, &["unbound"])?;
    same("id", unbound["id"].as_str(), Some("1234:11e8"))?;
    let reason = &unbound["why-not"][0];
    let change = reason["change"].as_str().unwrap_or_default();
    holds(change.contains("bind it to vfio-pci") && change.contains("cannot migrate"), change)?;
    let (_, listed) = report(&["devices"], None)?;
    holds(!listed.to_string().contains(&edu.address), "what has nothing to do with VFIO is left out")?;
    let (_, listed) = report(&["devices", "--all"], None)?;
    holds(listed.to_string().contains(&edu.address), "--all has it")?;
    let commands = reason["commands"].as_array().ok_or("no commands")?;
    let mut commands: Vec<&str> = commands.iter().filter_map(Value::as_str).collect();
    same("first", commands.remove(0), "modprobe vfio-pci")?;
    if !Path::new("/sys/bus/pci/drivers/vfio-pci").exists() {
        return Ok(());
    }
    // All but one of the commands do not bind it.
    let last = commands.pop().ok_or("too few commands")?;
    commands.iter().try_for_each(|command| carry_out(command))?;
    against(&device(&edu.address, &[])?, &["unbound"])?;
    carry_out(last)?;
    against(&device(&edu.address, &[])?, &["no-migration-in-driver"])
}

/// edu, which plain vfio-pci has: asked, and still without migration.
pub(crate) fn says_why_vfio_pci_does_not_migrate() -> Outcome {
    let edu = Edu::unbound()?;
    pci::bind(&edu.place)?;
    let listed = device(&edu.address, &[])?;
    against(&listed, &["no-migration-in-driver"])?;
    same("driver", listed["driver"].as_str(), Some("vfio-pci"))?;
    let group = fs::read_link(edu.place.join("iommu_group"))?;
    let group = Path::new("/dev/vfio").join(group.file_name().ok_or("a group without a number")?);
    same("group", listed["group"].as_str(), group.to_str())?;
    let asked = device(&edu.address, &["--probe"])?;
    against(&asked, &["no-migration-in-driver"])?;
    let text = asked["why-not"][0]["text"].as_str().unwrap_or_default();
    holds(text.contains("vfio-pci has no migration"), text)?;
    holds(asked["probed"] == true && asked["flags"].is_null(), "it was opened, and has no flags")?;
    let truth = Truth::hardware(&Opened::by_group(&group, &edu.address)?)?;
    same("interrupts and regions", &(interrupts(&asked), regions(&asked)), &truth)?;
    holds(truth.0[1] > 0 && truth.1.contains(&(0, 1 << 20)), "edu has MSI and a BAR of 1 MiB")?;
    // What sysfs alone tells agrees.
    same("interrupts without opening it", interrupts(&listed), truth.0)?;
    let by_file = device_at(&format!("{}:{}", group.display(), edu.address))?;
    same("by its group's file", by_file["name"].as_str(), Some(edu.address.as_str()))
}

fn device_at(target: &str) -> Outcome<Value> {
    let (_, report) = report(&["devices", target], None)?;
    Ok(report["devices"][0].clone())
}

/// Carries out `echo TEXT > FILE`.
fn carry_out(command: &str) -> Outcome {
    let said = command.strip_prefix("echo ").and_then(|rest| rest.split_once(" > "));
    let (text, file) = said.ok_or_else(|| format!("no command that is known here: {command}"))?;
    fs::write(file, text).map_err(|error| format!("{command}: {error}").into())
}

/// edu, which is unbound before and after.
struct Edu {
    place: PathBuf,
    address: String,
}

impl Edu {
    fn unbound() -> Outcome<Self> {
        let place = edu::find().ok_or("there is no edu")?;
        pci::unbind(&place)?;
        let address = pci::address(&place)?.to_owned();
        Ok(Self { place, address })
    }
}

impl Drop for Edu {
    fn drop(&mut self) {
        if let Err(error) = pci::unbind(&self.place) {
            eprintln!("unbinding edu: {error}");
        }
    }
}

/// A folder that has some of this machine's trees, and nothing of the others.
struct Tree(PathBuf);

impl Tree {
    fn new(names: &[&str]) -> Outcome<Self> {
        let top = PathBuf::from(format!("/tmp/tree-{}", std::process::id()));
        fs::create_dir_all(&top)?;
        for name in names {
            symlink(Path::new("/").join(name), top.join(name))?;
        }
        Ok(Self(top))
    }

    fn top(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}

/// Fails unless `doctor` ended a check so. The check.
fn check(report: &Value, id: &str, status: &str) -> Outcome<Value> {
    let checks = report["checks"].as_array().ok_or("no checks")?;
    let check = checks.iter().find(|check| check["id"] == id).ok_or_else(|| format!("no check {id}"))?;
    let found = check["status"].as_str();
    same(&format!("doctor's {id}"), found, Some(status)).map_err(|error| format!("{error}: {check}"))?;
    let fix = check["fix"].is_string();
    holds(fix == (status != "ok"), &format!("a fix, and only where one is needed: {check}"))?;
    Ok(check.clone())
}

fn fix(check: &Value) -> &str {
    check["fix"].as_str().unwrap_or_default()
}

/// What either machine has.
fn sound_otherwise(report: &Value) -> Outcome {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    same("kernel", report["kernel"].as_str(), Some(release.trim()))?;
    same("a kernel device can migrate", report["kernel-devices"].as_bool(), Some(true))?;
    same("a vfio-user device can", report["vfio-user"].as_bool(), Some(true))?;
    for id in ["kernel-version", "kernel-config", "vfio", "config-vfio-mdev", "config-kvm"] {
        check(report, id, "ok")?;
    }
    for id in ["iommu-groups", "dev-vfio", "dev-kvm", "kvm-nested", "memlock", "memfd"] {
        check(report, id, "ok")?;
    }
    Ok(())
}

/// The stock kernel has no iommufd, no module of it, and nothing to load.
pub(crate) fn doctor_misses_iommufd() -> Outcome {
    let _device = one_port()?;
    let (exit, missed) = report(&["doctor"], None)?;
    same("exit code", exit, 0)?;
    sound_otherwise(&missed)?;
    for (id, option) in [
        ("config-iommufd", "CONFIG_IOMMUFD"),
        ("config-vfio-device-cdev", "CONFIG_VFIO_DEVICE_CDEV"),
        ("config-iommufd-driver", "CONFIG_IOMMUFD_DRIVER"),
        ("dev-iommu", "CONFIG_IOMMUFD"),
    ] {
        let check = check(&missed, id, "warn")?;
        holds(fix(&check).contains(option) && !fix(&check).contains("modprobe"), fix(&check))?;
    }
    check(&missed, "device-files", "ok")?;
    // Without the kernel's configuration it cannot know that there is nothing to load.
    let tree = Tree::new(&["sys", "dev", "proc"])?;
    let (_, unsure) = report(&["doctor", "--root", tree.top()], None)?;
    check(&unsure, "kernel-config", "unknown")?;
    check(&unsure, "config-iommufd", "unknown")?;
    let unsure_check = check(&unsure, "dev-iommu", "warn")?;
    holds(
        fix(&unsure_check).contains("modprobe iommufd, or") && fix(&unsure_check).contains("CONFIG_IOMMUFD"),
        fix(&unsure_check),
    )?;
    drop(tree);
    // Were there an iommufd, it would be found.
    let tree = Tree::new(&["sys", "proc", "boot"])?;
    fs::create_dir(tree.0.join("dev"))?;
    fs::write(tree.0.join("dev/iommu"), "")?;
    let (_, made_up) = report(&["doctor", "--root", tree.top()], None)?;
    holds(check(&made_up, "dev-iommu", "warn").is_err(), "an iommufd is noticed")?;
    check(&made_up, "dev-iommu", "ok")?;
    check(&made_up, "dev-vfio", "warn").map(|_| ())
}

/// The rebuilt modules have it, whatever the configuration of the kernel proper says.
pub(crate) fn doctor_finds_iommufd() -> Outcome {
    let _device = one_port()?;
    let (exit, found) = report(&["doctor"], None)?;
    same("exit code", exit, 0)?;
    sound_otherwise(&found)?;
    for id in ["config-iommufd", "config-vfio-device-cdev", "config-iommufd-driver"] {
        let check = check(&found, id, "ok")?;
        let found = check["found"].as_str().unwrap_or_default();
        holds(found.contains("though the kernel's configuration has it off"), found)?;
    }
    check(&found, "dev-iommu", "ok")?;
    check(&found, "device-files", "ok")?;
    // Were it not there, it would be missed.
    let tree = Tree::new(&["boot"])?;
    for dir in ["sys/module/vfio", "dev/vfio", "proc/sys/kernel"] {
        fs::create_dir_all(tree.0.join(dir))?;
    }
    let release = "proc/sys/kernel/osrelease";
    fs::write(tree.0.join(release), fs::read(Path::new("/").join(release))?)?;
    fs::write(tree.0.join("dev/vfio/vfio"), "")?;
    let (_, without) = report(&["doctor", "--root", tree.top()], None)?;
    for id in ["config-iommufd", "config-vfio-device-cdev", "config-iommufd-driver", "dev-iommu"] {
        holds(check(&without, id, "ok").is_err(), &format!("{id} is missed"))?;
        check(&without, id, "warn")?;
    }
    // With neither way to memory nothing can be opened.
    fs::remove_file(tree.0.join("dev/vfio/vfio"))?;
    let (exit, neither) = report(&["doctor", "--root", tree.top()], None)?;
    same("exit code with neither", exit, 1)?;
    check(&neither, "dev-vfio", "missing")?;
    check(&neither, "dev-iommu", "missing").map(|_| ())
}
