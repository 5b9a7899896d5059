//! A kernel of its own, as small as the tests allow, with iommufd's mock IOMMU: the only one that tracks dirty pages
//! without hardware (`drivers/iommu/iommufd/selftest.c`). Debian builds none with it, so this one is built here, from
//! Debian's source package; that takes minutes, so it is no part of the kernel ring.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

use super::console::heard;
use super::packages::Packages;
use super::{boot, finish, image, packages, step, words};
use crate::command::{command, failed, text};
use crate::run::Outcome;

/// What the machine has. Everything is in the kernel: there are no modules.
const HAS: &str = "mtty,cdev,iommufd-mock";
/// What building a whole kernel takes beyond what building modules does.
const TOOLS: [(&str, &str); 2] = [("flex", "flex"), ("bison", "bison")];
const LIBRARY: &str = "libelf-dev";
/// Parts of the source that the configuration leaves out anyway, and that are large. The folders stay: the configuration
/// is put together from all of them.
const LEFT_OUT: [&str; 7] = [
    "*/drivers/gpu/*.[ch]",
    "*/drivers/net/*/*.[ch]",
    "*/drivers/media/*.[ch]",
    "*/sound/*.[ch]",
    "*.rst",
    "*.dts",
    "*.dtsi",
];
/// What is on; all else is off.
const CONFIGURATION: &str = "\
CONFIG_64BIT=y
CONFIG_CC_OPTIMIZE_FOR_SIZE=y
CONFIG_KERNEL_GZIP=y
CONFIG_PRINTK=y
CONFIG_BUG=y
CONFIG_MULTIUSER=y
CONFIG_FUTEX=y
CONFIG_EPOLL=y
CONFIG_EVENTFD=y
CONFIG_SIGNALFD=y
CONFIG_TIMERFD=y
CONFIG_POSIX_TIMERS=y
CONFIG_HIGH_RES_TIMERS=y
CONFIG_BINFMT_ELF=y
CONFIG_BLK_DEV_INITRD=y
CONFIG_RD_GZIP=y
CONFIG_FILE_LOCKING=y
CONFIG_PROC_FS=y
CONFIG_PROC_SYSCTL=y
CONFIG_SYSFS=y
CONFIG_SHMEM=y
CONFIG_TMPFS=y
CONFIG_HUGETLBFS=y
CONFIG_DEVTMPFS=y
CONFIG_ADVISE_SYSCALLS=y
CONFIG_MEMBARRIER=y
CONFIG_TTY=y
CONFIG_SERIAL_8250=y
CONFIG_SERIAL_8250_CONSOLE=y
CONFIG_NET=y
CONFIG_UNIX=y
CONFIG_PCI=y
CONFIG_ACPI=y
CONFIG_DEBUG_KERNEL=y
CONFIG_DEBUG_FS=y
CONFIG_RUNTIME_TESTING_MENU=y
CONFIG_FAULT_INJECTION=y
CONFIG_IOMMU_SUPPORT=y
CONFIG_IOMMUFD=y
CONFIG_IOMMUFD_TEST=y
CONFIG_VFIO=y
CONFIG_VFIO_DEVICE_CDEV=y
CONFIG_VFIO_GROUP=y
CONFIG_VFIO_CONTAINER=y
CONFIG_SAMPLES=y
CONFIG_SAMPLE_VFIO_MDEV_MTTY=y
";

/// Builds the kernel, unless it stands there, and runs in it what it has the means for, or those tests whose name has one
/// of `named` in it.
pub(crate) fn run(top: &Path, named: &[&str]) -> Result<Outcome, String> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(Outcome::Skipped("the kernel tests boot an x86-64 kernel".into()));
    }
    let cache = top.join("target/kernel-test");
    std::fs::create_dir_all(&cache).map_err(failed(&cache))?;
    let packages = match packages::fetch(&cache)? {
        packages::Fetched::There(packages) => packages,
        packages::Fetched::CannotBeHad(why) => return Ok(Outcome::Skipped(why)),
    };
    let kernel = kernel(&packages, &cache)?;
    let programs = step("building the tests and the command", || image::programs(top))?;
    let config = kernel.with_file_name("configuration");
    let image = image::make(&cache, "mock", &programs, &config, &[], Vec::new())?;
    let report = step("booting", || {
        let alone = AtomicBool::new(false);
        let text = boot::boot(&kernel, &image, &words(HAS, named), boot::Plugged::Functions, &alone)?;
        heard(&text, named.is_empty())
    })
    .map_err(|why| format!("mock: {why}"))?;
    let rows: Vec<_> = report.tests.into_iter().map(|test| ("mock", test)).collect();
    finish(named, &rows)
}

/// The kernel's image, built from this configuration.
fn kernel(packages: &Packages, cache: &Path) -> Result<PathBuf, String> {
    let home = cache.join(format!("{}-mock", packages.version));
    let (image, configured) = (home.join("bzImage"), home.join("configuration"));
    // Written last: what stands without it, or with another, is made again.
    if std::fs::read_to_string(&configured).is_ok_and(|there| there == CONFIGURATION) {
        return Ok(image);
    }
    if let Err(why) = packages::install(cache, &TOOLS, LIBRARY) {
        return Err(format!("what builds a kernel cannot be had: {why}"));
    }
    if home.exists() {
        std::fs::remove_dir_all(&home).map_err(failed(&home))?;
    }
    let source = home.join("source");
    std::fs::create_dir_all(&source).map_err(failed(&source))?;
    step("unpacking the kernel's source", || unpack(&packages.source, &source))?;
    configure(&source)?;
    step("building a kernel with a mock IOMMU (minutes)", || {
        let jobs = std::thread::available_parallelism().map_or(1, usize::from);
        command("make", &["-s", &format!("-j{jobs}"), "bzImage"], &source)
    })?;
    let built = source.join("arch/x86/boot/bzImage");
    std::fs::copy(&built, &image).map_err(failed(&built))?;
    std::fs::remove_dir_all(&source).map_err(failed(&source))?;
    std::fs::write(&configured, CONFIGURATION).map_err(failed(&configured))?;
    Ok(image)
}

fn unpack(package: &Path, source: &Path) -> Result<(), String> {
    let excludes: String = LEFT_OUT.iter().map(|pattern| format!(" --exclude='{pattern}'")).collect();
    let script = format!(
        "dpkg --fsys-tarfile '{}' | tar -xO --wildcards './usr/src/*.tar.xz' | tar -xJ --strip-components=1{excludes}",
        text(package)?
    );
    command("sh", &["-c", &script], source).map(drop)
}

/// Turns on what is listed, and nothing else but what that needs.
fn configure(source: &Path) -> Result<(), String> {
    let wanted = source.join("wanted");
    std::fs::write(&wanted, CONFIGURATION).map_err(failed(&wanted))?;
    command("make", &["-s", &format!("KCONFIG_ALLCONFIG={}", text(&wanted)?), "allnoconfig"], source)?;
    let file = source.join(".config");
    let taken = std::fs::read_to_string(&file).map_err(failed(&file))?;
    let left = left_out(CONFIGURATION, &taken);
    if left.is_empty() {
        return Ok(());
    }
    Err(format!("this kernel cannot be configured with {}; does it need something new?", left.join(", ")))
}

/// What was wanted of a configuration, and is not in it.
fn left_out<'a>(wanted: &'a str, taken: &str) -> Vec<&'a str> {
    wanted.lines().filter(|line| taken.lines().all(|there| there != *line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_that_the_kernel_does_not_take_is_noticed() {
        let taken = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_BC=y\n";
        assert_eq!(left_out("CONFIG_A=y\nCONFIG_BC=y\n", taken), [""; 0]);
        assert_eq!(left_out("CONFIG_A=y\nCONFIG_B=y\n", taken), ["CONFIG_B=y"]);
    }
}
