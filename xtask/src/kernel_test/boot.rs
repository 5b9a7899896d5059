//! Boots a kernel in software emulation and hears what it says.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::command::{tail, text};

/// A boot with all its tests takes half a minute on an idle machine.
const PATIENCE: Duration = Duration::from_secs(480);

/// What is plugged into a machine.
pub(super) enum Plugged {
    /// Devices without migration behind an IOMMU, for vfio-pci: edu, a network card of PCI Express, and two functions of one
    /// IOMMU group.
    Functions,
    /// A USB controller with 16 MSI vectors, on a kernel told not to remap interrupts.
    UnmappedVectors,
    /// A network card, whose frames go through a socket.
    Link { socket: UnixStream, address: &'static str },
}

/// Boots until the machine switches itself off; what was on its console.
///
/// QEMU's processor with SVM and nested paging: inside, the kernel's own KVM works. RDRAND, or whoever wants a random
/// number waits for the machine to gather entropy. `-cpu max` makes migration data
/// move twenty times slower on Debian's kernel. `words` are for the first process, on the kernel's command line.
/// A machine that is `given_up` meanwhile is killed.
///
/// The kernel's timer ticks all the time (`nohz=off highres=off`). Where it is set anew for each event, now and then its
/// interrupt does not arrive while a nested guest runs (QEMU 10.0 on a busy host; the kernel says "rcu_preempt kthread
/// timer wakeup didn't happen"): nothing sets it again then, and the machine stands until another interrupt comes. Nor does it
/// judge at boot whether the timer works (`no_timer_check`): on a busy host it may not see a tick in time, and gives up.
pub(super) fn boot(
    kernel: &Path,
    image: &Path,
    words: &str,
    plugged: Plugged,
    given_up: &AtomicBool,
) -> Result<String, String> {
    let words = match plugged {
        Plugged::UnmappedVectors => format!("intremap=off {words}"),
        _ => words.to_owned(),
    };
    let line =
        format!("console=ttyS0 panic=-1 quiet intel_iommu=on no_timer_check nohz=off highres=off {words}");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-accel", "tcg", "-M", "q35", "-cpu", "qemu64,+npt,+rdrand", "-smp", "1", "-m", "1024"])
        .args(["-display", "none", "-vga", "none", "-monitor", "none", "-serial", "file:/dev/stdout"])
        .args(["-no-reboot", "-append", &line, "-kernel", text(kernel)?, "-initrd", text(image)?])
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit());
    match plugged {
        Plugged::Functions => {
            qemu.args(["-net", "none", "-device", "intel-iommu,intremap=on", "-device", "edu"])
                .args(["-netdev", "hubport,id=nowhere,hubid=0", "-device", "e1000e,netdev=nowhere"])
                .args([
                    "-device",
                    "pci-testdev,addr=10.0,multifunction=on",
                    "-device",
                    "pci-testdev,addr=10.1",
                ])
                .stdin(Stdio::null());
        }
        Plugged::UnmappedVectors => {
            qemu.args(["-net", "none", "-device", "intel-iommu", "-device", "nec-usb-xhci,msi=on,msix=off"])
                .stdin(Stdio::null());
        }
        Plugged::Link { socket, address } => {
            // Its standard input is the socket: no file or port that somebody else could take.
            qemu.args(["-netdev", "stream,id=link,server=off,addr.type=fd,addr.str=0", "-device"])
                .arg(format!("virtio-net-pci,netdev=link,romfile=,mac={address}"))
                .stdin(Stdio::from(OwnedFd::from(socket)));
        }
    }
    let mut child = qemu.spawn().map_err(|error| format!("cannot start qemu-system-x86_64: {error}"))?;
    // It holds the socket: the other machine is to see its end.
    drop(qemu);
    let stdout = child.stdout.take();
    let reader = std::thread::spawn(move || {
        let mut said = Vec::new();
        if let Some(mut stdout) = stdout {
            // What was read before an error is all there is.
            let _ = stdout.read_to_end(&mut said);
        }
        String::from_utf8_lossy(&said).into_owned()
    });
    let began = Instant::now();
    let ended = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if given_up.load(Ordering::Relaxed) => {
                break Err("the machine was given up, and killed".into());
            }
            Ok(None) if began.elapsed() > PATIENCE => {
                break Err(format!(
                    "the machine was not done after {} s, and was killed",
                    PATIENCE.as_secs()
                ));
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => break Err(format!("waiting for QEMU: {error}")),
        }
    };
    if ended.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let said = reader.join().map_err(|_| "reading the console failed")?;
    match ended {
        Ok(status) if status.success() => Ok(said),
        Ok(status) => Err(format!("QEMU: {status}; the end of the console:\n{}", tail(&said))),
        Err(why) => Err(format!("{why}; the end of the console:\n{}", tail(&said))),
    }
}
