//! The real-kernel ring: boots a Debian kernel in software emulation and runs `crates/kernel-tests` inside of it.
//!
//! Nothing here needs hardware, a kernel build, or what the host's kernel can do. Everything is made below
//! `target/kernel-test`, and found there again the next time.

mod boot;
mod console;
mod image;
mod mock;
mod modules;
mod packages;
mod pair;

use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use crate::run::Outcome;

pub(crate) use self::mock::run as run_mock;

/// A set of modules to boot with.
struct Set {
    name: &'static str,
    what: &'static str,
    /// Modules in the order in which they are loaded.
    modules: &'static [&'static str],
    /// Which of them are built here, from the kernel's own source.
    rebuilt: bool,
    /// What the tests find there. It failing to be there fails the ring, instead of leaving tests out.
    has: &'static str,
}

const SETS: [Set; 2] = [
    Set {
        name: "stock",
        what: "the kernel as Debian builds it (groups and type1; no iommufd)",
        modules: &[
            "irqbypass",
            "kvm",
            "ccp",
            "kvm-amd",
            "vfio",
            "vfio_iommu_type1",
            "vfio-pci-core",
            "vfio-pci",
            "mdev",
            "mtty",
            "migdev",
            "psample",
            "netdevsim",
        ],
        rebuilt: false,
        has: "mtty,migdev,kvm,edu,no-cdev,devlink",
    },
    Set {
        name: "iommufd",
        what: "its VFIO modules rebuilt from the same source with iommufd and cdev, which Debian leaves out",
        modules: &[
            "irqbypass",
            "kvm",
            "ccp",
            "kvm-amd",
            "iova_bitmap",
            "iommufd",
            "vfio",
            "vfio_iommu_type1",
            "mdev",
            "mtty",
            "migdev",
        ],
        rebuilt: true,
        has: "mtty,migdev,kvm,cdev",
    },
];

/// Two machines, joined by a network link.
const PAIR: Set = Set {
    name: "pair",
    what: "two machines at once, joined by a network link: the kernel as Debian builds it",
    modules: &[
        "irqbypass",
        "kvm",
        "ccp",
        "kvm-amd",
        "vfio",
        "vfio_iommu_type1",
        "mdev",
        "migdev",
        "failover",
        "net_failover",
        "virtio_net",
    ],
    rebuilt: false,
    has: "migdev,kvm,no-cdev,peer",
};

/// A host that does not remap interrupts.
const UNMAPPED: Set = Set {
    name: "unmapped",
    what: "the kernel as Debian builds it, without remapping of interrupts",
    modules: &["irqbypass", "vfio", "vfio_iommu_type1", "vfio-pci-core", "vfio-pci"],
    rebuilt: false,
    has: "no-remapping",
};

/// Runs the ring, or those of its tests whose name has one of `named` in it.
pub(crate) fn run(top: &Path, named: &[&str]) -> Result<Outcome, String> {
    if !cfg!(target_arch = "x86_64") {
        return Ok(Outcome::Skipped("the kernel tests boot an x86-64 kernel".into()));
    }
    let cache = top.join("target/kernel-test");
    std::fs::create_dir_all(&cache).map_err(|error| format!("{}: {error}", cache.display()))?;
    let packages = match packages::fetch(&cache)? {
        packages::Fetched::There(packages) => packages,
        packages::Fetched::CannotBeHad(why) => return Ok(Outcome::Skipped(why)),
    };
    let kernel =
        step("unpacking the kernel and building modules", || modules::build(&packages, top, &cache))?;
    let programs = step("building the tests and the command", || image::programs(top))?;
    let made = |set: &Set| {
        let files =
            set.modules.iter().map(|name| kernel.module(name, set.rebuilt)).collect::<Result<_, _>>()?;
        image::make(&cache, set.name, &programs, &kernel.config, set.modules, files)
    };
    let boot_one = |set: &Set, plugged: boot::Plugged| {
        let alone = AtomicBool::new(false);
        let image = made(set)?;
        step(&format!("booting {}: {}", set.name, set.what), || {
            let words = words(set.has, named);
            let text = boot::boot(&kernel.image, &image, &words, plugged, &alone)?;
            console::heard(&text, named.is_empty()).map(|report| report.tests)
        })
    };
    // Each machine has one processor: two at once, whatever there are.
    let [one, other] = &SETS;
    let (left, right) = std::thread::scope(|scope| {
        let left = scope.spawn(|| boot_one(one, boot::Plugged::Functions));
        let right = boot_one(other, boot::Plugged::Functions);
        (left.join().unwrap_or_else(|_| Err("the thread of its machine failed".into())), right)
    });
    let image = made(&PAIR)?;
    let both = step(&format!("booting {}: {}", PAIR.name, PAIR.what), || {
        pair::run(&kernel.image, &image, &words(PAIR.has, named), named.is_empty())
    });
    let unmapped = boot_one(&UNMAPPED, boot::Plugged::UnmappedVectors);
    let mut rows = Vec::new();
    for (set, tests) in [(one, left), (other, right), (&PAIR, both), (&UNMAPPED, unmapped)] {
        let tests = tests.map_err(|why| format!("{}: {why}", set.name))?;
        rows.extend(tests.into_iter().map(|test| (set.name, test)));
    }
    finish(named, &rows)
}

/// Prints a table of all tests. `rows`: the name of a set, and a test.
fn finish(named: &[&str], rows: &[(&str, console::Test)]) -> Result<Outcome, String> {
    if rows.is_empty() {
        return Err(format!("no kernel test is named like {}", named.join(" or ")));
    }
    println!();
    for (set, test) in rows {
        let outcome = test.failure.as_ref().map_or("passed".into(), |why| format!("FAILED: {why}"));
        println!("kernel test {set:<8} {:<52} {outcome}", test.name);
    }
    let failed = rows.iter().filter(|(_, test)| test.failure.is_some()).count();
    if failed > 0 {
        return Err(format!("{failed} of {} kernel tests failed", rows.len()));
    }
    Ok(Outcome::Passed(Some(rows.len() as u64)))
}

/// What a machine's first process is told, on the kernel's command line.
fn words(has: &str, named: &[&str]) -> String {
    let only = if named.is_empty() { String::new() } else { format!(" ktest.only={}", named.join(",")) };
    format!("ktest.has={has}{only}")
}

/// Says what is done, and how long it took.
fn step<T>(what: &str, act: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    eprintln!("kernel-test: {what} …");
    let began = Instant::now();
    let done = act()?;
    eprintln!("kernel-test: {what}: {:.1} s", began.elapsed().as_secs_f64());
    Ok(done)
}
