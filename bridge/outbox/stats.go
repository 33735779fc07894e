package outbox

import (
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Usage is what is stored for one destination, or for all.
type Usage struct {
	Records     int
	Bytes       int64     // of the queued records, those included that wait for their flush
	Limit       int64     // on Bytes, or for all on Bytes and DeadBytes; 0: none
	Oldest      time.Time // when the oldest queued record was queued; zero: there is none
	DeadLetters int
	DeadBytes   int64

	Appended uint64 // records, since the outbox was opened; of a destination only

	// What operators have done since the outbox was opened; of a destination only.
	Purged, PurgedDead uint64 // records and dead letters deleted
	Redriven           uint64 // dead letters queued again
}

// Stats is the state of an outbox.
type Stats struct {
	Usage
	Destinations map[string]Usage // all that had something since the outbox was opened, or are known
}

// Know makes destinations count from now on, with nothing stored: their metrics are there before their first record.
func (o *Outbox) Know(destinations ...string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, name := range destinations {
		_, _ = o.account(name) // past the most that there can be, an append will say so
	}
}

// Stats counts; it doesn't read the store and is quick however much is queued.
func (o *Outbox) Stats() Stats {
	o.mu.Lock()
	defer o.mu.Unlock()
	s := Stats{
		Usage:        o.total.usage(o.o.MaxBytes),
		Destinations: make(map[string]Usage, len(o.accounts)),
	}
	for _, a := range o.accounts {
		u := a.usage(o.caps.of(a.name).MaxBytes)
		if seq, ok := a.order.first(o.present); ok {
			it, _ := o.items.of(seq)
			u.Oldest = time.UnixMilli(it.queued).UTC()
			if s.Oldest.IsZero() || u.Oldest.Before(s.Oldest) {
				s.Oldest = u.Oldest
			}
		}
		s.Destinations[a.name] = u
	}
	return s
}

func (a *account) usage(limit int64) Usage {
	return Usage{
		Records: a.records, Bytes: a.bytes, Limit: max(limit, 0), DeadLetters: a.dead, DeadBytes: a.deadBytes,
		Appended: a.appended, Purged: a.purged, PurgedDead: a.purgedDead, Redriven: a.redriven,
	}
}

var (
	recordsDesc   = desc("records", "Records queued.", "destination")
	bytesDesc     = desc("bytes", "Bytes of the records queued.", "destination")
	oldestDesc    = desc("oldest_seconds", "Age of the oldest record queued; 0: none.", "destination")
	deadDesc      = desc("dead_letters", "Dead letters kept.", "destination")
	deadBytesDesc = desc("dead_letter_bytes", "Bytes of the dead letters kept.", "destination")
	appendedDesc  = desc("appended_total", "Records appended, redriven dead letters aside.", "destination")
	purgedDesc    = desc("purged_total", "Records and dead letters deleted by operators, by the state they were in.", "destination", "state")
	redrivenDesc  = desc("redriven_total", "Dead letters queued again by operators.", "destination")
	limitDesc     = desc("limit_bytes", "Cap on the bytes of queued records and dead letters together; 0: none.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("throughline_outbox_"+name, help, labels, nil)
}

// metrics counts refusals and what is dropped, and reports the stats when it is collected.
type metrics struct {
	o       *Outbox
	refused map[string]prometheus.Counter // by cap
	vec     *prometheus.CounterVec
	dropped *prometheus.CounterVec
}

// The caps, as a metric's label.
const (
	capTotal       = "total"
	capDestination = "destination"
	capUnflushed   = "unflushed"
	capDisk        = "disk" // not a cap but a floor
)

func newMetrics(r prometheus.Registerer, o *Outbox) (*metrics, error) {
	m := &metrics{o: o, refused: make(map[string]prometheus.Counter)}
	m.vec = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_outbox_refused_total",
		Help: "Appends that were refused, by the cap they would have passed; disk: too little is free on the file system.",
	}, []string{"cap"})
	for _, c := range []string{capTotal, capDestination, capUnflushed, capDisk} {
		m.refused[c] = m.vec.WithLabelValues(c)
	}
	m.dropped = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "throughline_outbox_dropped_total",
		Help: "Records that were dropped, and their publishes acknowledged, since there was no room and their destination is to drop them then.",
	}, []string{"destination"})
	m.define(Caps{}, o.caps)
	if r == nil {
		return m, nil
	}
	return m, r.Register(m)
}

func (m *metrics) refuse(e *FullError) { m.refused[e.cap()].Inc() }

// cap is which one was passed.
func (e *FullError) cap() string {
	switch {
	case e.Unflushed:
		return capUnflushed
	case e.Disk:
		return capDisk
	case e.Destination != "":
		return capDestination
	default:
		return capTotal
	}
}

// define has a counter for each destination, though nothing of it was dropped yet.
func (m *metrics) define(old, now Caps) {
	for name := range old.Of {
		if _, ok := now.Of[name]; !ok {
			m.dropped.DeleteLabelValues(label(name))
		}
	}
	for name := range now.Of {
		m.dropped.WithLabelValues(label(name))
	}
}

func (m *metrics) drop(destination string) { m.dropped.WithLabelValues(label(destination)).Inc() }

// label makes a name fit for one: with other than UTF-8 the metrics package panics.
func label(name string) string { return strings.ToValidUTF8(name, "\uFFFD") }

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	m.vec.Describe(ch)
	m.dropped.Describe(ch)
	for _, d := range []*prometheus.Desc{recordsDesc, bytesDesc, oldestDesc, deadDesc, deadBytesDesc, appendedDesc, purgedDesc, redrivenDesc, limitDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	m.vec.Collect(ch)
	m.dropped.Collect(ch)
	s := m.o.Stats()
	now := m.o.o.Now()
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	counter := func(d *prometheus.Desc, value uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
	}
	gauge(limitDesc, float64(s.Limit))
	for name, u := range s.Destinations {
		name = label(name)
		gauge(recordsDesc, float64(u.Records), name)
		gauge(bytesDesc, float64(u.Bytes), name)
		age := 0.0
		if !u.Oldest.IsZero() {
			age = max(0, now.Sub(u.Oldest).Seconds())
		}
		gauge(oldestDesc, age, name)
		gauge(deadDesc, float64(u.DeadLetters), name)
		gauge(deadBytesDesc, float64(u.DeadBytes), name)
		counter(appendedDesc, u.Appended, name)
		counter(purgedDesc, u.Purged, name, "queued")
		counter(purgedDesc, u.PurgedDead, name, "dead")
		counter(redrivenDesc, u.Redriven, name)
	}
}
