//! Guest RAM to which somebody's writes are not logged: refused by name, or sent once more while the guest is paused.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::toy::*;
use vfio_migration::{Completed, Machine, MigrateError, SourceOptions};
use vfio_migration_memory::{Coverage, DirtySource, GuestRam, MemoryError};
use vfio_migration_types::{Bitmap, PAGE_SIZE, RamOffset, Range};

/// The VMM's devices in other processes, which log what their coverage says: nothing of what is written here.
#[derive(Debug)]
struct Workers {
    coverage: Coverage,
    calls: Mutex<Vec<&'static str>>,
}

impl Workers {
    fn seeing(coverage: Coverage) -> Arc<Self> {
        Arc::new(Self { coverage, calls: Mutex::default() })
    }

    fn call(&self, what: &'static str) -> Result<(), MemoryError> {
        self.calls.lock().unwrap().push(what);
        Ok(())
    }
}

impl DirtySource for Workers {
    fn name(&self) -> String {
        "virtio workers".into()
    }

    fn coverage(&self) -> Coverage {
        self.coverage.clone()
    }

    fn start(&self) -> Result<(), MemoryError> {
        self.call("start")
    }

    fn report(&self, _: &mut Bitmap) -> Result<(), MemoryError> {
        self.call("report")
    }

    fn stop(&self) -> Result<(), MemoryError> {
        self.call("stop")
    }
}

fn options() -> SourceOptions {
    let mut options = tls_source();
    options.verify = true;
    options.downtime_limit = Duration::from_secs(5);
    options
}

fn nothing() -> Coverage {
    Coverage::Nothing("they are processes that log nothing".into())
}

/// The first of two regions, all of it.
fn low(ram: &GuestRam) -> Coverage {
    let region = ram.regions()[0];
    let seen = vec![Range::new(region.offset, region.len).unwrap()];
    Coverage::Regions { seen, why: "its slots are logged alone".into() }
}

/// A guest beside which workers write that see as much as `coverage` says.
fn beside(coverage: impl FnOnce(&GuestRam) -> Coverage, plan: &Plan) -> (Arc<Toy>, Arc<Workers>) {
    let source = Toy::booted(plan);
    let workers = Workers::seeing(coverage(&source.ram()));
    *source.sources.lock().unwrap() = Some(vec![source.vcpu_log() as Arc<dyn DirtySource>, workers.clone()]);
    (source, workers)
}

/// Migrates; once everything has been sent, the workers write one page of the second region, which no log sees.
fn migrate_written(source: &Arc<Toy>, plan: &Plan, mut options: SourceOptions) -> (Both, u64) {
    options.pause_before_switchover = true;
    let sent = Arc::new(Mutex::new(0));
    let of_thread = sent.clone();
    let both = migrate_by(
        source,
        plan,
        "tcp:127.0.0.1:0",
        options,
        tls_destination(),
        |_, to| to.clone(),
        |control| {
            let source = source.clone();
            std::thread::spawn(move || {
                wait_for("everything to be sent once", || control.progress().waiting);
                *of_thread.lock().unwrap() = control.progress().bytes.ram;
                let ram = source.ram();
                let at = RamOffset(ram.regions()[1].offset.0 + 5 * PAGE_SIZE);
                ram.write_u64(at, 0x5eed_5eed).unwrap();
                crate::migrate::continue_until_heard(&control);
            });
        },
    );
    let sent = *sent.lock().unwrap();
    (both, sent)
}

fn refusals(source: Result<Completed, MigrateError>) -> Vec<String> {
    let Err(MigrateError::Refused(reasons)) = source else { panic!("{source:?}") };
    assert!(reasons.iter().all(|reason| reason.code == "dirty-uncovered"), "{reasons:?}");
    reasons.into_iter().map(|reason| reason.text).collect()
}

#[test]
fn each_region_is_refused_by_name_with_the_reason_and_the_guest_never_notices() {
    let plan = Plan::default();
    type Case = (fn(&GuestRam) -> Coverage, usize, &'static [&'static str]);
    let cases: [Case; 2] = [
        (|_| nothing(), 2, &["virtio workers", "0x0+0x400000", "processes that log nothing"]),
        (low, 1, &["virtio workers", "0x100000000+0x400000", "its slots are logged alone"]),
    ];
    for (coverage, count, says) in cases {
        let (source, workers) = beside(coverage, &plan);
        let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), tls_destination());
        let texts = refusals(both.source);
        assert_eq!(texts.len(), count, "{texts:?}");
        assert!(says.iter().all(|says| texts[0].contains(says)), "{texts:?}");
        assert!(workers.calls.lock().unwrap().is_empty());
        source.prove_running();
    }
    // A VMM that names no source at all.
    let source = Toy::booted(&plan);
    *source.sources.lock().unwrap() = Some(Vec::new());
    let both = migrate(&source, &plan, "tcp:127.0.0.1:0", options(), tls_destination());
    let texts = refusals(both.source);
    assert!(texts.len() == 2 && texts[0].contains("the VMM names none"), "{texts:?}");
    source.prove_running();
}

#[test]
fn a_region_that_is_allowed_is_sent_once_more_and_the_others_are_not() {
    let plan = Plan::default();
    for (coverage, times) in [(low as fn(&GuestRam) -> Coverage, 1), (|_| nothing(), 2)] {
        let (source, workers) = beside(coverage, &plan);
        let mut options = options();
        options.allow_all_dirty = true;
        let (both, before) = migrate_written(&source, &plan, options);
        let (completed, _, destination) = both.unwrap();
        prove_moved(&source, &destination);
        assert_eq!(completed.ram_digest_match, Some(true));
        // Two thirds of each region's 1024 pages hold something; what the guest itself writes comes on top.
        let again = completed.bytes.ram - before;
        let region = 1024 * PAGE_SIZE * 2 / 3;
        assert!((times * region..times * region + region / 2).contains(&again), "{again} bytes again");
        let calls = workers.calls.lock().unwrap().clone();
        assert_eq!(calls.contains(&"start"), times == 1, "what sees nothing is not started: {calls:?}");
    }
}

/// Whoever claims to see everything, and does not, is found out by the digests: the page above is lost without the coverage.
#[test]
fn without_the_coverage_the_page_is_lost_and_that_is_noticed() {
    let plan = Plan::default();
    let (source, _) = beside(|_| Coverage::All, &plan);
    let (both, _) = migrate_written(&source, &plan, options());
    let Err(MigrateError::Aborted(aborted)) = both.source else { panic!("{:?}", both.source) };
    assert!(aborted.restored && aborted.cause.text.contains("differ"), "{aborted}");
    source.prove_restored();
}
