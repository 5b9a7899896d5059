//! Boots a kernel in software emulation and hears what it says.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::text;

/// A boot with all its tests takes half a minute on an idle machine.
const PATIENCE: Duration = Duration::from_secs(480);

/// Boots until the machine switches itself off; what was on its console.
///
/// QEMU's processor with SVM and nested paging: inside, the kernel's own KVM works. RDRAND, or whoever wants a random
/// number waits for the machine to gather entropy. `-cpu max` makes migration data
/// move twenty times slower on Debian's kernel.
pub(super) fn boot(kernel: &Path, image: &Path, has: &str, only: &[&str]) -> Result<String, String> {
    let mut line = format!("console=ttyS0 panic=-1 quiet intel_iommu=on ktest.has={has}");
    if !only.is_empty() {
        line += &format!(" ktest.only={}", only.join(","));
    }
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-M", "q35", "-cpu", "qemu64,+npt,+rdrand", "-smp", "1", "-m", "1024"])
        .args(["-nographic", "-no-reboot", "-net", "none", "-append", &line])
        // A device without migration behind an IOMMU, for vfio-pci.
        .args(["-device", "intel-iommu,intremap=on", "-device", "edu"])
        .args(["-kernel", text(kernel)?, "-initrd", text(image)?])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|error| format!("cannot start qemu-system-x86_64: {error}"))?;
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
            Ok(None) if began.elapsed() > PATIENCE => {
                let _ = child.kill();
                let _ = child.wait();
                break Err(format!(
                    "the machine was not done after {} s, and was killed",
                    PATIENCE.as_secs()
                ));
            }
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Err(error) => break Err(format!("waiting for QEMU: {error}")),
        }
    };
    let said = reader.join().map_err(|_| "reading the console failed")?;
    match ended {
        Ok(status) if status.success() => Ok(said),
        Ok(status) => Err(format!("QEMU: {status}; the end of the console:\n{}", super::tail(&said))),
        Err(why) => Err(format!("{why}; the end of the console:\n{}", super::tail(&said))),
    }
}
