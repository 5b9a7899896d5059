//! Migrations between machines whose RAM is of different kinds, owned and lent.

use std::time::Duration;

use crate::toy::*;

/// From owned RAM to lent, from lent to owned, and from each kind of region to each other: the same guest arrives. What the
/// destination's regions held before, of which the source sends nothing, is gone.
#[test]
fn ram_of_any_kind_moves_into_ram_of_any_other() {
    let of = |ram| Plan { pages: 512, ram, ..Plan::default() };
    let mut ways = vec![(ToyRam::Four, ToyRam::Lent(0)), (ToyRam::Lent(1), ToyRam::Four)];
    ways.extend((0..4).map(|turned| (ToyRam::Lent(0), ToyRam::Lent(turned))));
    for (here, there) in ways {
        println!("{here:?} to {there:?}");
        let source = Toy::booted(&of(here));
        source.prove_running();
        let mut options = tls_source();
        (options.verify, options.downtime_limit) = (true, Duration::from_secs(2));
        let there = Toy::new(&of(there));
        let moved = migrate_into(
            &source,
            there,
            "tcp:127.0.0.1:0",
            options,
            tls_destination(),
            |_, uri| uri.clone(),
            |_| {},
        );
        let (completed, _, destination) = moved.unwrap();
        prove_moved(&source, &destination);
        destination.prove_running();
        assert_eq!(completed.ram_digest_match, Some(true));
    }
}
