//! The vfio-user back end against the sample device's server.

mod adopt;
mod sample;
mod support;
