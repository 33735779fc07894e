package bridge

import "github.com/throughline-mqtt/throughline/bridge/outbox"

// What a listing of the queue is made of, for callers that know this package alone.
type (
	Filter = outbox.Filter
	Entry  = outbox.Entry
	Stats  = outbox.Stats
	Usage  = outbox.Usage
	Cursor = outbox.Cursor
)

// Where a Filter looks.
const (
	QueuedAndDead = outbox.QueuedAndDead
	QueuedOnly    = outbox.QueuedOnly
	DeadOnly      = outbox.DeadOnly
)
