package bridge

import (
	"strings"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// Reasons for a dead letter, as they stand in it and in the metrics.
const (
	ReasonPoison  = "poison"  // refused three times
	ReasonGone    = "gone"    // answered with 410
	ReasonExpired = "expired" // older than the destination's max_age
)

// Where the trace context of a delivered record went.
const (
	carrierBody    = "body"    // into the agreed field; into the headers too if so configured
	carrierHeaders = "headers" // into the headers alone
	carrierNone    = "none"    // nowhere: the trace ends here
)

// metrics are those of all destinations. Their labels are bounded: rule and
// destination names, classes and reasons.
type metrics struct {
	attempts    *prometheus.CounterVec
	deliveries  *prometheus.CounterVec
	dead        *prometheus.CounterVec
	inFlight    *prometheus.GaugeVec
	open        *prometheus.GaugeVec
	paused      *prometheus.GaugeVec
	held        *prometheus.GaugeVec
	laneLeft    *prometheus.CounterVec
	replaced    *prometheus.CounterVec
	undecodable *prometheus.CounterVec
	latency     *prometheus.HistogramVec
	total       map[Class]*atomic.Uint64 // attempts of all destinations, those that are gone too
	batch       *prometheus.HistogramVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "throughline_" + name, Help: help}, labels)
	}
	gauge := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "throughline_" + name, Help: help}, []string{"destination"})
	}
	m := &metrics{
		attempts: counter("delivery_attempts_total",
			"Attempts by what their outcome meant; each record in a batch is one.", "destination", "class"),
		deliveries: counter("deliveries_total",
			"Records delivered, by where their trace context went (body, headers, none).", "rule", "destination", "carrier"),
		dead: counter("delivery_dead_letters_total",
			"Records given up, by reason.", "destination", "reason"),
		inFlight: gauge("delivery_in_flight", "Requests under way."),
		open:     gauge("delivery_breaker_open", "1 while the destination is only probed, because it fails."),
		paused:   gauge("delivery_paused", "1 while nothing is sent, because an operator paused the destination or it is gone (410)."),
		held:     gauge("delivery_held_records", "Records kept for a destination that is not defined."),
		laneLeft: counter("delivery_lane_left_total",
			"Records that left their lane, since they kept failing while others got through.", "destination"),
		replaced: counter("delivery_trace_field_replaced_total",
			"Attempts whose body had a value where the trace context goes, which it replaced.", "destination"),
		undecodable: counter("delivery_trace_undecodable_total",
			"Attempts whose stored trace context could not be read, so that they began a new trace.", "destination"),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "throughline_delivery_latency_seconds",
			Help: "Time from the publish to the destination's 2xx.",
			// From a loopback webhook to an outage of a day.
			Buckets: []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 3600, 21600, 86400},
		}, []string{"destination"}),
		batch: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "throughline_delivery_batch_records",
			Help:    "Records in a request, of destinations with batches alone.",
			Buckets: []float64{1, 2, 5, 10, 20, 50, MaxBatch},
		}, []string{"destination"}),
	}
	m.total = map[Class]*atomic.Uint64{}
	for _, c := range classes {
		m.total[c] = new(atomic.Uint64)
	}
	if reg == nil {
		return m, nil
	}
	for _, c := range []prometheus.Collector{m.attempts, m.deliveries, m.dead, m.inFlight, m.open, m.paused, m.held, m.laneLeft,
		m.replaced, m.undecodable, m.latency, m.batch} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

// label makes a stored name fit for a label: with other than UTF-8 the metrics
// package panics.
func label(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }

// meters are the metrics of one destination.
type meters struct {
	all         *metrics
	name        string
	attempts    map[Class]prometheus.Counter
	dead        map[string]prometheus.Counter
	inFlight    prometheus.Gauge
	open        prometheus.Gauge
	paused      prometheus.Gauge
	held        prometheus.Gauge
	laneLeft    prometheus.Counter
	replaced    prometheus.Counter
	undecodable prometheus.Counter
	latency     prometheus.Observer
	batch       prometheus.Observer
}

// destination returns the metrics of one, all of them there from the start.
func (m *metrics) destination(name string) *meters {
	name = label(name)
	d := &meters{
		all:         m,
		name:        name,
		attempts:    map[Class]prometheus.Counter{},
		dead:        map[string]prometheus.Counter{},
		inFlight:    m.inFlight.WithLabelValues(name),
		open:        m.open.WithLabelValues(name),
		paused:      m.paused.WithLabelValues(name),
		held:        m.held.WithLabelValues(name),
		laneLeft:    m.laneLeft.WithLabelValues(name),
		replaced:    m.replaced.WithLabelValues(name),
		undecodable: m.undecodable.WithLabelValues(name),
		latency:     m.latency.WithLabelValues(name),
		batch:       m.batch.WithLabelValues(name),
	}
	for _, c := range classes {
		d.attempts[c] = m.attempts.WithLabelValues(name, string(c))
	}
	for _, reason := range []string{ReasonPoison, ReasonGone, ReasonExpired} {
		d.dead[reason] = m.dead.WithLabelValues(name, reason)
	}
	return d
}

// attempted counts an attempt at each of n records.
func (d *meters) attempted(c Class, n int) {
	d.attempts[c].Add(float64(n))
	d.all.total[c].Add(uint64(n))
}

// delivered counts a record that is done.
func (d *meters) delivered(rule, carrier string, seconds float64) {
	d.all.deliveries.WithLabelValues(label(rule), d.name, carrier).Inc()
	d.latency.Observe(seconds)
}

// forget removes the destination's series.
func (d *meters) forget() {
	of := prometheus.Labels{"destination": d.name}
	for _, v := range []interface {
		DeletePartialMatch(prometheus.Labels) int
	}{d.all.attempts, d.all.deliveries, d.all.dead, d.all.inFlight, d.all.open, d.all.paused, d.all.held, d.all.laneLeft,
		d.all.replaced, d.all.undecodable, d.all.latency, d.all.batch} {
		v.DeletePartialMatch(of)
	}
}
