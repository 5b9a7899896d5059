//! The examples do what they say: a device of `examples/copier.rs` moves by `examples/migrate.rs` to another of its kind.

#[path = "../../examples/copier.rs"]
#[expect(dead_code, reason = "its main")]
mod copier;
#[path = "../../examples/migrate.rs"]
#[expect(dead_code, reason = "its main")]
mod migrate;

use vfio_user_peer::{Server, StopHandle};

/// Stops the servers, also when the test fails: their scope waits for them.
struct Stopping<'a>(&'a StopHandle);

impl Drop for Stopping<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

#[test]
fn a_copier_moves_with_its_guest() {
    let dir = tempfile::tempdir().unwrap();
    let stop = StopHandle::new().unwrap();
    let paths = ["a.sock", "b.sock"].map(|name| dir.path().join(name));
    let servers = paths.each_ref().map(|path| Server::bind(path).unwrap());
    let devices = [copier::Copier::default(), copier::Copier::default()];
    std::thread::scope(|scope| {
        let _stopping = Stopping(&stop);
        for (server, device) in servers.iter().zip(&devices) {
            let stop = &stop;
            scope.spawn(move || server.serve(device, stop).unwrap());
        }
        // Back again: the first device is as good as new once its client has left.
        for (from, to) in [(0, 1), (1, 0)] {
            migrate::migrate(paths[from].to_str().unwrap(), paths[to].to_str().unwrap()).unwrap();
        }
    });
}
