//! Sessions on a scripted device: each answer that means something else than it seems to.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use rustix::io::Errno;
use vfio_migration_types::{DeviceId, MigrationFlags, MigrationState as S, path};

use super::error::SessionError;
use super::port::{Port, PortError, PortStream};
use super::state_machine::StateMachine;
use crate::contract::{Chunk, Position, PrecopyProgress, ResumingSession, SavingSession};
use crate::error::Remedy;

/// The scripted device's next answers to read(2), write(2) and PRECOPY_INFO, and its state.
#[derive(Debug)]
struct State {
    now: S,
    reads: VecDeque<Result<usize, Errno>>,
    writes: VecDeque<Result<usize, Errno>>,
    infos: VecDeque<Result<PrecopyProgress, Errno>>,
    /// The next SET fails with this after it went so far.
    fail: Option<(Errno, S)>,
    reset_leaves: S,
    /// Gives a data descriptor at every SET, or at none.
    always_stream: bool,
    no_stream: bool,
    sets: Vec<S>,
    resets: u32,
    written: Vec<u8>,
}

#[derive(Clone, Debug)]
struct Fake {
    state: Arc<Mutex<State>>,
    flags: MigrationFlags,
}

impl Fake {
    fn new() -> Self {
        let state = State {
            now: S::Running,
            reads: VecDeque::new(),
            writes: VecDeque::new(),
            infos: VecDeque::new(),
            fail: None,
            reset_leaves: S::Running,
            always_stream: false,
            no_stream: false,
            sets: Vec::new(),
            resets: 0,
            written: Vec::new(),
        };
        Self { state: Arc::new(Mutex::new(state)), flags: MigrationFlags { p2p: true, pre_copy: true } }
    }

    fn machine(&self) -> Arc<StateMachine> {
        let id = DeviceId::new("t0").unwrap();
        Arc::new(StateMachine::new(id, Box::new(self.clone()), Some(self.flags)))
    }

    fn with<T>(&self, act: impl FnOnce(&mut State) -> T) -> T {
        act(&mut self.state.lock().unwrap())
    }

    /// As a guest's function-level reset does: the device runs, and nobody was asked.
    fn guest_resets(&self) {
        self.with(|state| state.now = S::Running);
    }
}

impl Port for Fake {
    fn state(&self) -> Result<S, PortError> {
        Ok(self.with(|state| state.now))
    }

    fn set_state(&self, _from: S, to: S) -> Result<Option<Box<dyn PortStream>>, PortError> {
        let flags = self.flags;
        self.with(|state| {
            assert_ne!(state.now, S::Error, "nothing is SET in ERROR");
            state.sets.push(to);
            if let Some((errno, reached)) = state.fail.take() {
                state.now = reached;
                return Err(errno.into());
            }
            if path(state.now, to, flags).is_err() {
                return Err(Errno::INVAL.into());
            }
            let session = |at: S| at.is_saving() || at == S::Resuming;
            let opens = session(to) && !(state.now.is_saving() && to.is_saving()) && state.now != to;
            state.now = to;
            Ok((opens && !state.no_stream) || state.always_stream)
        })
        .map(|opens| opens.then(|| Box::new(self.clone()) as Box<dyn PortStream>))
    }

    fn reset(&self) -> Result<(), PortError> {
        self.with(|state| {
            state.resets += 1;
            state.now = state.reset_leaves;
        });
        Ok(())
    }
}

impl PortStream for Fake {
    fn read(&self, buf: &mut [u8]) -> Result<usize, PortError> {
        let next = self.with(|state| state.reads.pop_front()).expect("a read that the test did not foresee");
        Ok(next.inspect(|n| assert!(*n <= buf.len()))?)
    }

    fn write(&self, bytes: &[u8]) -> Result<usize, PortError> {
        self.with(|state| {
            let next = state.writes.pop_front().expect("a write that the test did not foresee");
            Ok(next.inspect(|n| state.written.extend(bytes.iter().take(*n)))?)
        })
    }

    fn precopy_info(&self) -> Result<Option<PrecopyProgress>, PortError> {
        let next = self.with(|state| state.infos.pop_front());
        Ok(Some(next.expect("a question that the test did not foresee")?))
    }
}

fn saving(fake: &Fake) -> Box<dyn SavingSession> {
    Box::new(fake.machine().begin_precopy().unwrap())
}

fn read(session: &mut Box<dyn SavingSession>) -> Result<Chunk, crate::error::DeviceError> {
    session.read(&mut [0; 64])
}

#[track_caller]
fn assert_lost(error: &crate::error::DeviceError) {
    let lost = error.source.downcast_ref::<SessionError>();
    assert!(matches!(lost, Some(SessionError::Lost(_))), "{error:?}");
}

#[test]
fn in_precopy_both_zero_and_enomsg_are_nothing_now() {
    let fake = Fake::new();
    let mut session = saving(&fake);
    fake.with(|state| state.reads = [Ok(5), Ok(0), Err(Errno::NOMSG), Ok(64)].into());
    assert_eq!(read(&mut session).unwrap(), Chunk::Data(5));
    assert_eq!(read(&mut session).unwrap(), Chunk::NothingNow);
    assert_eq!(read(&mut session).unwrap(), Chunk::NothingNow);
    assert_eq!(read(&mut session).unwrap(), Chunk::Data(64));
    assert!(session.read(&mut []).is_err(), "an empty read would look like an end");
}

#[test]
fn in_stop_copy_zero_is_the_end_and_enomsg_an_error() {
    let fake = Fake::new();
    let mut session = saving(&fake);
    session.go(Position::PreCopyP2p).unwrap();
    session.go(Position::StopCopy).unwrap();
    fake.with(|state| state.reads = [Ok(7), Ok(0), Ok(0), Err(Errno::NOMSG)].into());
    assert_eq!(read(&mut session).unwrap(), Chunk::Data(7));
    assert_eq!(read(&mut session).unwrap(), Chunk::End);
    assert_eq!(read(&mut session).unwrap(), Chunk::End);
    assert_eq!(read(&mut session).unwrap_err().errno, Some(Errno::NOMSG));
    assert_eq!(session.progress().unwrap(), None);
    assert_eq!(session.end().unwrap(), S::Stop);
}

#[test]
fn moves_inside_the_session_keep_its_descriptor() {
    let fake = Fake::new();
    let mut session = saving(&fake);
    for position in [Position::PreCopyP2p, Position::PreCopy, Position::StopCopy] {
        session.go(position).unwrap();
        fake.with(|state| state.reads.push_back(Ok(1)));
        assert_eq!(read(&mut session).unwrap(), Chunk::Data(1));
    }
    let refused = session.go(Position::PreCopy).unwrap_err();
    assert_eq!((refused.now, session.position()), (Some(S::StopCopy), Position::StopCopy));
    // Negative control: a kernel that opens a second session inside the first is not believed.
    let fake = Fake::new();
    let mut session = saving(&fake);
    fake.with(|state| state.always_stream = true);
    let odd = session.go(Position::PreCopyP2p).unwrap_err();
    assert!(matches!(odd.source.downcast_ref(), Some(SessionError::SecondStream)), "{odd:?}");
}

#[test]
fn asking_for_progress_is_asking_the_kernel_each_time() {
    let fake = Fake::new();
    let mut session = saving(&fake);
    let info = PrecopyProgress { initial_bytes: 9, dirty_bytes: 4096, reinit: true };
    fake.with(|state| state.infos = [Ok(info), Err(Errno::IO)].into());
    let progress = session.progress().unwrap().unwrap();
    assert_eq!((progress.initial_bytes, progress.dirty_bytes, progress.reinit), (9, 4096, true));
    assert_eq!(session.progress().unwrap_err().errno, Some(Errno::IO));
}

#[test]
fn a_guests_reset_ends_the_saving_session_and_is_reported() {
    // Whatever the dead descriptor answers.
    for answer in [Ok(0), Err(Errno::NODEV), Err(Errno::NOMSG), Err(Errno::INVAL)] {
        let fake = Fake::new();
        let mut session = saving(&fake);
        fake.guest_resets();
        fake.with(|state| state.reads = [answer].into());
        assert_lost(&read(&mut session).unwrap_err());
    }
    let fake = Fake::new();
    let mut session = saving(&fake);
    fake.guest_resets();
    fake.with(|state| state.infos = [Err(Errno::NODEV)].into());
    assert_lost(&session.progress().unwrap_err());
    // A step is not taken: it would open a session whose data is no sequel.
    let sets = fake.with(|state| state.sets.len());
    let refused = session.go(Position::StopCopy).unwrap_err();
    assert_eq!((refused.now, refused.remedy), (Some(S::Running), Remedy::TryAnotherState));
    assert_eq!(fake.with(|state| state.sets.len()), sets);
    assert_eq!(session.end().unwrap(), S::Running);
    assert_eq!(fake.with(|state| state.sets.len()), sets, "it runs already");
}

#[test]
fn a_dead_descriptor_is_a_lost_session_even_if_the_state_looks_right() {
    let fake = Fake::new();
    let mut session = saving(&fake);
    fake.with(|state| state.reads = [Err(Errno::NODEV), Err(Errno::IO)].into());
    assert_lost(&read(&mut session).unwrap_err());
    // Negative control: another error is what it is.
    let other = read(&mut session).unwrap_err();
    assert!(other.source.downcast_ref::<SessionError>().is_none() && other.errno == Some(Errno::IO));
}

#[test]
fn after_a_failed_set_the_device_is_asked_where_it_is() {
    let fake = Fake::new();
    let mut session = saving(&fake);
    fake.with(|state| state.fail = Some((Errno::IO, S::PreCopyP2p)));
    let failed = session.go(Position::StopCopy).unwrap_err();
    assert_eq!((failed.now, failed.errno), (Some(S::PreCopyP2p), Some(Errno::IO)));
    assert_eq!((failed.remedy, session.position()), (Remedy::TryAnotherState, Position::PreCopyP2p));
    session.go(Position::StopCopy).unwrap();
    drop(session);
    assert_eq!(fake.with(|state| state.now), S::Stop);
}

#[test]
fn nothing_is_set_in_error_and_only_a_reset_leaves_it() {
    let fake = Fake::new();
    let mut session = saving(&fake);
    fake.with(|state| {
        state.now = S::Error;
        state.sets.clear();
    });
    let machine = fake.machine();
    // The fake panics if it is SET in ERROR.
    assert_eq!(session.go(Position::StopCopy).unwrap_err().remedy, Remedy::Reset);
    assert_eq!(machine.set_state(S::Stop).unwrap_err().remedy, Remedy::Reset);
    assert!(machine.begin_resuming().is_err() && machine.begin_stop_copy().is_err());
    assert!(session.end().is_err());
    machine.reset().unwrap();
    machine.set_state(S::Stop).unwrap();
    assert_eq!(fake.with(|state| state.sets.clone()), [S::Stop]);
}

#[test]
fn a_reset_that_does_not_leave_the_device_running_has_failed() {
    for state_after in [S::Error, S::Stop, S::Resuming] {
        let fake = Fake::new();
        fake.with(|state| state.reset_leaves = state_after);
        let failed = fake.machine().reset().unwrap_err();
        assert!(failed.source.to_string().contains(&state_after.to_string()), "{failed:?}");
    }
}

#[test]
fn a_session_that_is_open_is_not_opened_again_nor_a_descriptor_made_up() {
    let fake = Fake::new();
    let machine = fake.machine();
    let first = machine.begin_precopy().unwrap();
    assert!(machine.begin_precopy().is_err() && machine.begin_stop_copy().is_err());
    drop(first);
    fake.with(|state| state.no_stream = true);
    let none = machine.begin_precopy().unwrap_err();
    assert!(matches!(none.source.downcast_ref(), Some(SessionError::NoStream)), "{none:?}");
    assert_eq!(none.now, Some(S::PreCopy));
}

#[test]
fn states_of_sessions_are_not_set_from_outside() {
    let fake = Fake::new();
    let machine = fake.machine();
    for state in [S::PreCopy, S::StopCopy, S::Resuming, S::Error] {
        assert!(machine.set_state(state).is_err(), "{state}");
    }
    assert!(fake.with(|state| state.sets.is_empty()));
    for state in [S::RunningP2p, S::Stop, S::Running, S::Running] {
        machine.set_state(state).unwrap();
    }
    assert_eq!(fake.with(|state| state.sets.clone()), [S::RunningP2p, S::Stop, S::Running]);
}

#[test]
fn a_device_without_p2p_or_precopy_refuses_them_with_the_reason() {
    let fake = Fake { flags: MigrationFlags::default(), ..Fake::new() };
    let machine = fake.machine();
    let refused = machine.begin_precopy().unwrap_err();
    assert!(refused.source.to_string().contains("PRE_COPY"), "{refused:?}");
    assert!(machine.set_state(S::RunningP2p).is_err());
    assert!(fake.with(|state| state.sets.is_empty()));
    let mut session: Box<dyn SavingSession> = Box::new(machine.begin_stop_copy().unwrap());
    fake.with(|state| state.reads = [Ok(0)].into());
    assert_eq!(read(&mut session).unwrap(), Chunk::End);
}

#[test]
fn short_writes_go_on_and_a_write_of_nothing_does_not() {
    let fake = Fake::new();
    let mut session = fake.machine().begin_resuming().unwrap();
    fake.with(|state| state.writes = [Ok(2), Ok(1), Ok(3)].into());
    session.write(b"abcdef").unwrap();
    assert_eq!(fake.with(|state| state.written.clone()), b"abcdef");
    fake.with(|state| state.writes = [Ok(1), Ok(0)].into());
    assert!(session.write(b"xyz").is_err());
    fake.with(|state| state.writes = [Ok(4)].into());
    assert!(session.write(b"xyz").is_err(), "more than it was given");
    fake.with(|state| state.writes = [Err(Errno::FAULT)].into());
    assert_eq!(session.write(b"xyz").unwrap_err().errno, Some(Errno::FAULT));
}

#[test]
fn a_resuming_session_is_finished_or_reset_and_never_left_otherwise() {
    let fake = Fake::new();
    let machine = fake.machine();
    Box::new(machine.begin_resuming().unwrap()).finish().unwrap();
    assert_eq!(fake.with(|state| (state.now, state.resets)), (S::Stop, 0));
    Box::new(machine.begin_resuming().unwrap()).abort().unwrap();
    assert_eq!(fake.with(|state| (state.now, state.resets)), (S::Running, 1));
    drop(machine.begin_resuming().unwrap());
    assert_eq!(fake.with(|state| (state.now, state.resets)), (S::Running, 2));
    // RESUMING → STOP would make half a state the device's.
    let open = machine.begin_resuming().unwrap();
    assert!(machine.set_state(S::Running).is_err());
    // A second session begins with a reset, since the first one's descriptor cannot be had again.
    let second = machine.begin_resuming().unwrap();
    assert_eq!(fake.with(|state| state.resets), 3);
    drop((open, second));
}

#[test]
fn a_device_reset_under_its_resuming_session_does_not_pass_for_loaded() {
    let fake = Fake::new();
    let mut session = fake.machine().begin_resuming().unwrap();
    fake.guest_resets();
    fake.with(|state| state.writes = [Err(Errno::NODEV)].into());
    assert_lost(&session.write(b"abc").unwrap_err());
    let refused = Box::new(session).finish().unwrap_err();
    assert!(matches!(refused.source.downcast_ref(), Some(SessionError::Lost(S::Running))));
    assert_eq!(fake.with(|state| state.resets), 0, "that is for whoever is told");
}

#[test]
fn a_failed_finish_is_told_before_the_device_is_reset() {
    let fake = Fake::new();
    let machine = fake.machine();
    let session = machine.begin_resuming().unwrap();
    fake.with(|state| state.fail = Some((Errno::INVAL, S::Resuming)));
    let refused = Box::new(session).finish().unwrap_err();
    assert_eq!((refused.errno, refused.now), (Some(Errno::INVAL), Some(S::Resuming)));
    assert_eq!(fake.with(|state| (state.now, state.resets)), (S::Resuming, 0));
    machine.reset().unwrap();
    assert_eq!(fake.with(|state| (state.now, state.resets)), (S::Running, 1));
}
