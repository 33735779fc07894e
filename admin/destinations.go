package admin

import (
	"context"
	"errors"
	"net/http"
	"time"

	"github.com/throughline-mqtt/throughline/bridge"
)

// Destination is how a destination is, as the API shows it.
type Destination struct {
	Name  string `json:"name"`
	URL   string `json:"url,omitempty"`   // without credentials and query; absent: not defined
	State string `json:"state,omitempty"` // active | failing | paused | undefined; absent: no broker runs
	// Why is the class of the last answer if that was a failure, of one that is
	// active too; of one that is paused it is operator or gone.
	Why      string    `json:"why,omitempty"`
	Failure  string    `json:"failure,omitempty"`
	Since    time.Time `json:"since,omitzero"` // it is in that state
	InFlight int       `json:"in_flight"`
	usage
	OldestAge float64 `json:"oldest_seconds"` // 0: nothing is queued
}

// Destinations is an answer with all destinations.
type Destinations struct {
	Destinations []Destination `json:"destinations"`
}

// PausedDestination is what a listing says of a destination to which nothing is sent.
type PausedDestination struct {
	Name  string    `json:"name"`
	Why   string    `json:"why"`
	Since time.Time `json:"since,omitzero"`
}

func destination(s bridge.Status) Destination {
	d := Destination{
		Name: s.Name, URL: s.URL, State: string(s.State), Why: s.Why, Failure: s.Failure,
		InFlight: s.InFlight, usage: usageOf(s.Usage),
	}
	if !s.Since.IsZero() {
		d.Since = s.Since.UTC()
	}
	if !s.Oldest.IsZero() {
		d.OldestAge = max(0, time.Since(s.Oldest).Seconds())
	}
	return d
}

func pausedOf(all []bridge.Status) (paused []PausedDestination) {
	for _, s := range all {
		if s.State == bridge.StatePaused {
			paused = append(paused, PausedDestination{s.Name, s.Why, s.Since.UTC()})
		}
	}
	return paused
}

// Pause and Resume are what the requests of that name do.
func Pause(ctx context.Context, o Outbox, name string) (Destination, error) {
	s, err := o.Pause(ctx, name)
	return destination(s), err
}

// Resume is Pause's counterpart.
func Resume(ctx context.Context, o Outbox, name string) (Destination, error) {
	s, err := o.Resume(ctx, name)
	return destination(s), err
}

func (a *api) destinations(w http.ResponseWriter, _ *http.Request) {
	out := Destinations{Destinations: []Destination{}}
	for _, s := range a.Outbox.Destinations() {
		out.Destinations = append(out.Destinations, destination(s))
	}
	answer(w, http.StatusOK, out)
}

// changeDestination handles a pause or resume; done is for the log.
func (a *api) changeDestination(done string, do func(context.Context, Outbox, string) (Destination, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("name")
		d, err := do(r.Context(), a.Outbox, name)
		log := a.Logger.With("remote", r.RemoteAddr, "destination", name)
		switch {
		case errors.Is(err, bridge.ErrNoDestination):
			fail(w, http.StatusNotFound, "no such destination", "neither the rules nor the outbox know a destination "+quote(name))
		case err != nil:
			log.Error("destination "+done+" through the admin API, but not for longer than until a restart", "error", err)
			fail(w, http.StatusInternalServerError, "outbox can't be changed", err.Error())
		default:
			log.Info("destination "+done+" through the admin API", "records", d.Records)
			answer(w, http.StatusOK, d)
		}
	}
}
