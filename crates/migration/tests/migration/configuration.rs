//! What a VMM tells the one at the destination before that makes a machine.

use std::sync::Arc;

use vfio_migration::{
    Destination, DestinationOptions, IncomingOffer, Machine, MigrateError, NotBuilt, SaveOptions, Snapshot,
    Source, SourceOptions, save,
};

use crate::toy::secure::{tls_destination, tls_source};
use crate::toy::{Plan, Toy, prove_moved};

/// The most that an offer carries.
const MOST: usize = 65535;

/// Bytes of every kind: no text, no JSON.
fn words(len: usize) -> Vec<u8> {
    (0..=250).cycle().take(len).collect()
}

fn booted(configuration: &[u8]) -> Arc<Toy> {
    let toy = Toy::booted(&Plan::default());
    *toy.configuration.lock().unwrap() = configuration.to_vec();
    toy
}

/// Moves a guest; what its destination was told before it made a machine.
fn offered(source: &Arc<Toy>) -> Result<IncomingOffer, MigrateError> {
    let mut destination =
        Destination::listen(&"tcp:127.0.0.1:0".parse().unwrap(), tls_destination()).unwrap();
    let (to, control) = (destination.local().clone(), destination.control());
    std::thread::scope(|scope| {
        let arriving = scope.spawn(move || {
            let mut told = None;
            let there = Toy::new(&Plan::default());
            let build = |offer: &IncomingOffer| {
                told = Some(offer.clone());
                Ok::<_, NotBuilt>(there.clone() as Arc<dyn Machine>)
            };
            let arrived = destination.accept(build).is_ok();
            (told, there, arrived)
        });
        let moved = Source::new(source.clone(), tls_source()).migrate_to(&to, |_| {});
        if moved.is_err() {
            control.cancel();
        }
        let (told, there, arrived) = arriving.join().unwrap();
        assert_eq!(arrived, moved.is_ok());
        moved?;
        prove_moved(source, &there);
        Ok(told.unwrap())
    })
}

#[test]
fn a_vmms_own_configuration_is_there_before_its_machine() {
    for len in [0, 1, MOST] {
        let words = words(len);
        let offer = offered(&booted(&words)).unwrap();
        assert!(offer.configuration == words, "{len}");
        let digest = (len > 0).then(|| *blake3::hash(&words).as_bytes());
        assert_eq!(offer.configuration_digest, digest, "{len}");
    }
}

#[test]
fn a_configuration_that_is_too_long_is_refused_before_anything_is_touched() {
    let source = booted(&words(MOST + 1));
    let error = offered(&source).unwrap_err();
    let said = vfio_migration_types::error_chain(&error);
    assert!(said.contains("65536 bytes, where 65535 are the most"), "{said}");
    source.prove_restored();
}

#[test]
fn a_configuration_comes_back_with_its_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("snapshot");
    let (source, words) = (booted(&words(1000)), words(1000));
    let options = SourceOptions::default().for_saving();
    save(Source::new(source, options), &path, SaveOptions::default(), |_| {}).unwrap();
    let there = Toy::new(&Plan::default());
    let mut told = Vec::new();
    let build = |offer: &IncomingOffer| {
        told = offer.configuration.clone();
        Ok::<_, NotBuilt>(there.clone() as Arc<dyn Machine>)
    };
    Snapshot::open(&path).unwrap().restore(DestinationOptions::default(), build).unwrap();
    assert_eq!(told, words);
}
