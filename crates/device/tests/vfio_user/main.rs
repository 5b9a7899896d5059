//! The vfio-user back end against the sample device's server.

mod sample;
mod support;
