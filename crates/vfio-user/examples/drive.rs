//! Drives the `adder` example: adds, saves its state, resets it, restores the state.

use vfio_user_peer::{Client, ClientOptions, MigrationState};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: drive SOCKET")?;
    let client = Client::connect(&path, ClientOptions::default())?;
    println!("{:?}", client.negotiated());
    client.region_write(0, 0, &40u64.to_le_bytes())?;
    client.region_write(0, 8, &2u64.to_le_bytes())?;
    println!("40 + 2 = {}", sum(&client)?);

    client.set_mig_state(MigrationState::StopCopy)?;
    let mut state = Vec::new();
    let mut piece = [0; 4096];
    loop {
        match client.mig_data_read(&mut piece)? {
            0 => break,
            got => state.extend_from_slice(piece.get(..got).unwrap_or_default()),
        }
    }
    client.set_mig_state(MigrationState::Running)?;
    client.reset()?;
    println!("saved {} bytes; after a reset the sum is {}", state.len(), sum(&client)?);

    client.set_mig_state(MigrationState::Resuming)?;
    client.mig_data_write(&state)?;
    client.set_mig_state(MigrationState::Running)?;
    println!("restored, it is {} again", sum(&client)?);
    Ok(())
}

fn sum(client: &Client) -> Result<u64, vfio_user_peer::ClientError> {
    let mut raw = [0; 8];
    client.region_read(0, 16, &mut raw)?;
    Ok(u64::from_le_bytes(raw))
}
