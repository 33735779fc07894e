package sessions

// Waiting is how many messages have no packet identifier yet, and how many wait for an acknowledgement.
func (s *Session) Waiting() (queued, inflight int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queue) - s.head, len(s.flights)
}
