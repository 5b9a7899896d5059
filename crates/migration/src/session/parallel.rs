//! Doing something with every device at once: a barrier is reached when the slowest device has reached it.

use crate::session::threads::task;

/// Calls `work` for each item, each on a thread of its own, and returns the results in order. One item needs no thread; items
/// for which there is none left wait for the others.
pub(crate) fn for_each_device_parallel<T: Send, R: Send>(
    items: impl IntoIterator<Item = T>,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let mut items: Vec<T> = items.into_iter().collect();
    if items.len() < 2 {
        return items.drain(..).map(work).collect();
    }
    let work = &work;
    std::thread::scope(|scope| {
        let tasks: Vec<_> = items.into_iter().map(|item| task(scope, "device", move || work(item))).collect();
        tasks.into_iter().filter_map(|task| task.finish()).collect()
    })
}
