//! The kernel, unpacked, and the modules that are built against it.

use std::path::{Path, PathBuf};

use super::packages::Packages;
use crate::command::{command, failed, text};

/// Parts of the kernel's source that modules are built from.
const PARTS: [&str; 6] = [
    "samples/vfio-mdev/mtty.c",
    "drivers/net/netdevsim",
    "drivers/vfio",
    "drivers/iommu/iommufd",
    "drivers/iommu/iommu-priv.h",
    "lib/interval_tree.c",
];
/// What the kernel's configuration would say if iommufd were on. Debian's leaves it out.
const CONFIGURED: &str = "-DCONFIG_IOMMUFD=1 -DCONFIG_IOMMUFD_MODULE=1 -DCONFIG_IOMMUFD_DRIVER=1 \
    -DCONFIG_VFIO_DEVICE_CDEV=1 -DCONFIG_INTERVAL_TREE_SPAN_ITER=1 -DCONFIG_VFIO_MDEV_MODULE=1";

/// A kernel to boot, and its modules.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) image: PathBuf,
    /// What it was configured with.
    pub(super) config: PathBuf,
    /// Its own, compressed.
    stock: PathBuf,
    /// Built here: sets of folders with a module each.
    built: PathBuf,
}

impl Kernel {
    /// The file of a module; with `rebuilt`, the one that was built with iommufd where there is one.
    pub(super) fn module(&self, name: &str, rebuilt: bool) -> Result<PathBuf, String> {
        let own = |set: &str| find(&self.built.join(set), &[&format!("{name}.ko")]);
        let made = if rebuilt { own("iommufd") } else { own("plain") };
        let names = [format!("{name}.ko.xz"), format!("{}.ko.xz", name.replace('_', "-"))];
        made.or_else(|| find(&self.stock, &[&names[0], &names[1]]))
            .ok_or_else(|| format!("the kernel has no module {name}, and none was built"))
    }
}

pub(super) fn build(packages: &Packages, top: &Path, cache: &Path) -> Result<Kernel, String> {
    let home = cache.join(&packages.version);
    let kernel = Kernel {
        image: home.join(format!("root/boot/vmlinuz-{}-amd64", packages.version)),
        config: home.join(format!("root/boot/config-{}-amd64", packages.version)),
        stock: home.join(format!("root/lib/modules/{}-amd64/kernel", packages.version)),
        built: home.join("built"),
    };
    let root = home.join("root");
    let headers = root.join(format!("usr/src/linux-headers-{}-amd64", packages.version));
    // The last thing that is prepared: what stands without it was interrupted, or is of other parts, and is made again.
    let (done, parts) = (home.join("done"), PARTS.join("\n"));
    if !std::fs::read_to_string(&done).is_ok_and(|made| made == parts) {
        prepare(packages, &home, &kernel.built, &headers)?;
        std::fs::write(&done, parts).map_err(failed(&done))?;
    }
    for set in ["plain", "iommufd"] {
        let set = kernel.built.join(set);
        refresh(&top.join("kernel/migdev"), &set.join("migdev"))?;
        make(&set, &headers)?;
    }
    Ok(kernel)
}

/// Unpacks the kernel, and lays out what is built against it.
fn prepare(packages: &Packages, home: &Path, built: &Path, headers: &Path) -> Result<(), String> {
    if home.exists() {
        std::fs::remove_dir_all(home).map_err(failed(home))?;
    }
    let root = home.join("root");
    std::fs::create_dir_all(&root).map_err(failed(&root))?;
    for package in &packages.kernel {
        command("dpkg", &["-x", text(package)?, text(&root)?], home)?;
    }
    fit(headers, &root)?;
    let source = source(packages, home)?;
    plain(&built.join("plain"), &source)?;
    with_iommufd(&built.join("iommufd"), &source)
}

/// Makes the unpacked headers fit to build with where they are.
fn fit(headers: &Path, root: &Path) -> Result<(), String> {
    let makefile = headers.join("Makefile");
    let there = format!("include {}", text(&root.join("usr/src"))?);
    let old = std::fs::read_to_string(&makefile).map_err(failed(&makefile))?;
    std::fs::write(&makefile, old.replace("include /usr/src", &there)).map_err(failed(&makefile))?;
    // With it the build wants to add type information, by a tool that nothing else here needs.
    let vmlinux = headers.join("vmlinux");
    if vmlinux.exists() {
        std::fs::remove_file(&vmlinux).map_err(failed(&vmlinux))?;
    }
    Ok(())
}

fn source(packages: &Packages, home: &Path) -> Result<PathBuf, String> {
    let unpacked = home.join("source");
    std::fs::create_dir_all(&unpacked).map_err(failed(&unpacked))?;
    command("dpkg", &["-x", text(&packages.source)?, text(&unpacked)?], home)?;
    let archive =
        find(&unpacked.join("usr/src"), &[".tar.xz"]).ok_or("the source package holds no archive")?;
    let name = archive.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let folder = name.trim_end_matches(".tar.xz").to_owned();
    let parts: Vec<String> = PARTS.iter().map(|part| format!("{folder}/{part}")).collect();
    let arguments: Vec<&str> =
        ["-xJf", text(&archive)?].into_iter().chain(parts.iter().map(String::as_str)).collect();
    command("tar", &arguments, &unpacked)?;
    Ok(unpacked.join(folder))
}

/// mtty, netdevsim, which has devlink without having hardware, and migdev, for the kernel as it is.
fn plain(home: &Path, source: &Path) -> Result<(), String> {
    mtty(&home.join("mtty"), source)?;
    let netdevsim = home.join("netdevsim");
    copy_sources(&source.join("drivers/net/netdevsim"), &netdevsim)?;
    write(
        &netdevsim.join("Kbuild"),
        "netdevsim-y := netdev.o dev.o ethtool.o fib.o bus.o health.o hwstats.o udp_tunnels.o bpf.o ipsec.o macsec.o \
         psample.o\nobj-m := netdevsim.o\n",
    )?;
    write(&home.join("Kbuild"), "obj-m := mtty/ netdevsim/ migdev/\n")
}

/// The kernel's own VFIO and iommufd, unchanged, in the configuration that Debian does not build.
fn with_iommufd(home: &Path, source: &Path) -> Result<(), String> {
    mtty(&home.join("mtty"), source)?;
    copy_sources(&source.join("drivers/vfio"), &home.join("vfio"))?;
    copy_sources(&source.join("drivers/vfio/mdev"), &home.join("mdev"))?;
    copy_sources(&source.join("drivers/iommu/iommufd"), &home.join("iommufd"))?;
    let private = home.join("iommu-priv.h");
    std::fs::copy(source.join("drivers/iommu/iommu-priv.h"), &private).map_err(failed(&private))?;

    // A part of the kernel proper that is left out with iommufd.
    let tree = source.join("lib/interval_tree.c");
    let tree = std::fs::read_to_string(&tree).map_err(failed(&tree))?;
    let (before, spans) = tree
        .split_once("#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER")
        .ok_or("no span iterator in lib/interval_tree.c")?;
    let includes: Vec<&str> = before.lines().filter(|line| line.starts_with("#include")).collect();
    write(
        &home.join("iommufd/span.c"),
        &format!("{}\n#ifdef CONFIG_INTERVAL_TREE_SPAN_ITER{spans}", includes.join("\n")),
    )?;
    // Built into the kernel it needs no licence line; as a module it does.
    let bitmap = home.join("iommufd/iova_bitmap.c");
    let text = std::fs::read_to_string(&bitmap).map_err(failed(&bitmap))?;
    if !text.contains("MODULE_LICENSE") {
        write(&bitmap, &format!("{text}\n#include <linux/module.h>\nMODULE_LICENSE(\"GPL\");\n"))?;
    }
    write(
        &home.join("Kbuild"),
        &format!("subdir-ccflags-y := {CONFIGURED}\nobj-m := iommufd/ vfio/ mdev/ mtty/ migdev/\n"),
    )?;
    write(
        &home.join("iommufd/Kbuild"),
        "iommufd-y := device.o fault.o hw_pagetable.o io_pagetable.o ioas.o main.o pages.o vfio_compat.o span.o\n\
         obj-m := iommufd.o iova_bitmap.o\n",
    )?;
    write(
        &home.join("vfio/Kbuild"),
        "vfio-y := vfio_main.o device_cdev.o group.o iommufd.o container.o virqfd.o\n\
         obj-m := vfio.o vfio_iommu_type1.o\n",
    )?;
    write(&home.join("mdev/Kbuild"), "mdev-y := mdev_core.o mdev_sysfs.o mdev_driver.o\nobj-m := mdev.o\n")
}

fn mtty(home: &Path, source: &Path) -> Result<(), String> {
    std::fs::create_dir_all(home).map_err(failed(home))?;
    let file = home.join("mtty.c");
    std::fs::copy(source.join("samples/vfio-mdev/mtty.c"), &file).map_err(failed(&file))?;
    write(&home.join("Kbuild"), "obj-m := mtty.o\n")
}

fn make(home: &Path, headers: &Path) -> Result<(), String> {
    let home_is = format!("M={}", text(home)?);
    command("make", &["-C", text(headers)?, &home_is, "-j2", "modules"], home).map(|_| ())
}

/// Brings a copy of a driver's folder up to date. Files that are the same are left alone, so that `make` does not begin
/// anew.
fn refresh(from: &Path, to: &Path) -> Result<(), String> {
    std::fs::create_dir_all(to).map_err(failed(to))?;
    for entry in std::fs::read_dir(from).map_err(failed(from))?.flatten() {
        let (path, copy) = (entry.path(), to.join(entry.file_name()));
        if !path.is_file() {
            continue;
        }
        let bytes = std::fs::read(&path).map_err(failed(&path))?;
        if std::fs::read(&copy).is_ok_and(|old| old == bytes) {
            continue;
        }
        std::fs::write(&copy, bytes).map_err(failed(&copy))?;
    }
    Ok(())
}

/// Copies the C files of a folder, not those below it.
fn copy_sources(from: &Path, to: &Path) -> Result<(), String> {
    std::fs::create_dir_all(to).map_err(failed(to))?;
    for entry in std::fs::read_dir(from).map_err(failed(from))?.flatten() {
        let path = entry.path();
        let code = path.extension().is_some_and(|kind| kind == "c" || kind == "h");
        if let (true, Some(name)) = (code, path.file_name()) {
            std::fs::copy(&path, to.join(name)).map_err(failed(&path))?;
        }
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), String> {
    std::fs::write(path, text).map_err(failed(path))
}

/// The first file below `dir` whose name ends as one of `names`, with nothing but a folder's end before it.
fn find(dir: &Path, names: &[&str]) -> Option<PathBuf> {
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).collect();
    entries.sort();
    let fits = |path: &Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        names
            .iter()
            .any(|wanted| if wanted.starts_with('.') { name.ends_with(wanted) } else { name == *wanted })
    };
    entries.iter().find(|path| path.is_file() && fits(path)).cloned().or_else(|| {
        entries.iter().filter(|path| path.is_dir() && !path.is_symlink()).find_map(|path| find(path, names))
    })
}
