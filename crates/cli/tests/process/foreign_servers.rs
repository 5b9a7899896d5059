//! Device servers of other projects, which know no migration: told as they are, by every verb that meets one.

use std::io::Error;
use std::path::{Path, PathBuf};

use crate::support::{Setup, fails, run, until};
use serde_json::Value;
use vfio_bindings::bindings::vfio::{
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, ServerBackend, ServerRegion};
use vfio_user_peer::{
    Backend, DeviceInfo, DmaMapping, Errno, Extension, IrqRequest, RegionInfo, Server, StopHandle, irq_index,
    region_index,
};

/// A function with a config space and one BAR, as the published crate `vfio_user` serves it.
struct Plain(Vec<u8>);

impl Plain {
    const SIZE: usize = 4096;

    fn new() -> Self {
        let mut memory = vec![0; Self::SIZE];
        memory[..4].copy_from_slice(&[0x34, 0x12, 0x78, 0x56]);
        Self(memory)
    }
}

impl ServerBackend for Plain {
    fn region_read(&mut self, _region: u32, offset: u64, data: &mut [u8]) -> Result<(), Error> {
        let at = usize::try_from(offset).unwrap();
        data.copy_from_slice(&self.0[at..at + data.len()]);
        Ok(())
    }

    fn region_write(&mut self, _region: u32, _offset: u64, _data: &[u8]) -> Result<(), Error> {
        Ok(())
    }

    fn dma_map(
        &mut self,
        _flags: DmaMapFlags,
        _offset: u64,
        _address: u64,
        _size: u64,
        _fd: Option<std::fs::File>,
    ) -> Result<(), Error> {
        Ok(())
    }

    fn dma_unmap(&mut self, _flags: DmaUnmapFlags, _address: u64, _size: u64) -> Result<(), Error> {
        Ok(())
    }

    fn reset(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn set_irqs(
        &mut self,
        _index: u32,
        _flags: u32,
        _start: u32,
        _count: u32,
        _fds: Vec<std::fs::File>,
    ) -> Result<(), Error> {
        Ok(())
    }
}

/// A server that loses step over what it does not know, and takes one client after another.
fn loses_step(dir: &Path) -> PathBuf {
    let path = dir.join("rust-vmm.sock");
    let region = |index: u32| ServerRegion {
        region_info: vfio_region_info {
            argsz: 32,
            flags: VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE,
            index,
            size: match index {
                0 => Plain::SIZE as u64,
                region_index::CONFIG => 256,
                _ => 0,
            },
            ..Default::default()
        },
        sparse_areas: Vec::new(),
        mmap_fd: None,
    };
    let irqs = (0..irq_index::COUNT).map(|index| IrqInfo { index, flags: 1, count: 0 }).collect();
    let regions = (0..region_index::COUNT).map(region).collect();
    let server = vfio_user::Server::new(&path, true, irqs, regions).unwrap();
    std::thread::spawn(move || {
        loop {
            let _ = server.run(&mut Plain::new());
        }
    });
    path
}

/// A device of nothing at all, as libvfio-user's sample `null`; with a manifest, if there is one.
pub(crate) struct Null(pub(crate) Option<Vec<u8>>);

impl Backend for Null {
    fn device_info(&self) -> DeviceInfo {
        let (num_regions, num_irqs) = (region_index::COUNT, irq_index::COUNT);
        DeviceInfo { resettable: true, pci: true, num_regions, num_irqs }
    }

    fn region_info(&self, _index: u32) -> Result<RegionInfo, Errno> {
        Ok(RegionInfo::default())
    }

    fn irq_info(&self, _index: u32) -> Result<vfio_user_peer::IrqInfo, Errno> {
        Ok(vfio_user_peer::IrqInfo::default())
    }

    fn region_read(&self, _index: u32, _offset: u64, _into: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn region_write(&self, _index: u32, _offset: u64, _from: &[u8]) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn set_irqs(&self, _request: IrqRequest) -> Result<(), Errno> {
        Err(Errno::INVAL)
    }

    fn dma_map(&self, _mapping: DmaMapping) -> Result<(), Errno> {
        Ok(())
    }

    fn dma_unmap(&self, _iova: u64, _len: u64) -> Result<(), Errno> {
        Ok(())
    }

    fn extension(&self) -> Extension {
        Extension { manifest: self.0.is_some(), ..Extension::default() }
    }

    fn manifest(&self) -> Result<Vec<u8>, Errno> {
        self.0.clone().ok_or(Errno::NOTTY)
    }
}

fn null(dir: &Path) -> PathBuf {
    let path = dir.join("null.sock");
    let server = Server::bind(&path).unwrap();
    std::thread::spawn(move || server.serve(&Null(None), &StopHandle::new().unwrap()));
    path
}

#[test]
fn a_device_without_migration_is_a_verdict() {
    let dir = tempfile::tempdir().unwrap();
    for socket in [loses_step(dir.path()), null(dir.path())] {
        let path = socket.to_str().unwrap();
        let output = run(&["describe", path]);
        assert!(output.status.success(), "{path}: {output:?}");
        let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(manifest["no_migration"], "its server does not implement migration", "{manifest}");
        let output = run(&["check", path, path, "--json"]);
        assert_eq!(output.status.code(), Some(3), "{path}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stdout).contains("device-not-migratable"), "{output:?}");
        let file = dir.path().join("x.dev");
        let device = format!("vfio-user:{path}");
        let save = ["save", "--device", &device, "-o", file.to_str().unwrap()];
        fails(&save, 3, "does not implement migration");
        assert!(!file.exists());
    }
}

#[test]
fn a_guest_runs_with_a_device_whose_server_loses_step() {
    let dir = tempfile::tempdir().unwrap();
    let socket = loses_step(dir.path());
    let device = format!("vfio-user:{},id=net0", socket.display());
    let vm =
        Setup { devices: 0, vm_arguments: &["--device", &device], ..Setup::new(dir.path(), "a") }.start();
    vm.assert_runs();
    let info = vm.info();
    assert!(info["lost-devices"].as_array().is_none_or(Vec::is_empty), "{info}");
    until("the guest to be paused", || vm.call("stop", Value::Null).ok());
    vm.call("cont", Value::Null).unwrap();
    vm.assert_runs();
    let file = dir.path().join("x.vm");
    let save = ["save", "--control", vm.control.to_str().unwrap(), "-o", file.to_str().unwrap()];
    fails(&save, 3, "does not implement migration");
    vm.assert_runs();
}
