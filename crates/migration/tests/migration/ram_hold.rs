//! RAM keeps its layout for as long as a session counts on it, and a VMM can ask.

use vfio_migration::{Destination, Machine, NotBuilt, Source};

use vfio_migration_types::Phase;

use crate::toy::secure::{tls_destination, tls_source};
use crate::toy::{Plan, Toy, prove_moved};

#[test]
fn a_vmm_may_hot_plug_ram_before_and_after_a_session_and_not_in_it() {
    let plan = Plan::default();
    let (source, there) = (Toy::booted(&plan), Toy::new(&plan));
    let may_change = |toy: &Toy| Machine::ram(toy).may_change();
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let to = destination.local().clone();
    let (mut held, mut held_there) = (Vec::new(), Vec::new());
    std::thread::scope(|scope| {
        let built = there.clone();
        let arriving = scope.spawn(move || {
            destination.accept(|_| Ok::<_, NotBuilt>(built as std::sync::Arc<dyn Machine>)).map(drop)
        });
        Source::new(source.clone(), tls_source())
            .migrate_to(&to, |progress| {
                // Each phase is told of; later the destination may have let go.
                if progress.phase == Phase::Quiesce {
                    held.extend(may_change(&source).err());
                    held_there.extend(may_change(&there).err());
                }
            })
            .unwrap();
        arriving.join().unwrap().unwrap();
    });
    prove_moved(&source, &there);
    assert!(held[0].to_string().contains(&format!("a session with {to} is under way")), "{held:?}");
    assert!(held_there[0].to_string().contains("a session in which VM"), "{held_there:?}");
    may_change(&source).unwrap();
    may_change(&there).unwrap();
}
